//! String instructions: the bytes they write, counts, and stops in the middle.

use soft_cpu::CpuExit;

use crate::guest::*;
use crate::{f, r};

const REP_MOVSB: [u8; 2] = [0xf3, 0xa4];
const REP_STOSQ: [u8; 3] = [0xf3, 0x48, 0xab];

fn strings(code: &[u8], from: u64, to: u64, count: u64) -> Guest {
    Guest::new(code).reg(r::RSI, from).reg(r::RDI, to).reg(r::RCX, count)
}

/// Fills `len` bytes at `addr` with a pattern of period 251.
fn fill(g: &mut Guest, addr: u64, len: usize) {
    let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
    g.write(addr, &bytes);
}

/// Does to memory what `count` single MOVS instructions do.
fn moved(mem: &mut [u8], mut from: usize, mut to: usize, size: usize, count: usize, back: bool) {
    for _ in 0..count {
        let element = mem[from..from + size].to_vec();
        mem[to..to + size].copy_from_slice(&element);
        let step = |p: &mut usize| *p = if back { *p - size } else { *p + size };
        step(&mut from);
        step(&mut to);
    }
}

#[test]
fn rep_movs_is_as_many_single_moves_whatever_overlaps() {
    for (size, code) in
        [(1, &[0xf3, 0xa4][..]), (2, &[0xf3, 0x66, 0xa5]), (4, &[0xf3, 0xa5]), (8, &[0xf3, 0x48, 0xa5])]
    {
        for back in [false, true] {
            let offsets = [0, 1, 3, 4, 7, 8, 9, 64, 100, 4096, 5000];
            for (away, count) in offsets.into_iter().flat_map(|o| [(o, 1), (o, 700), (-o, 700)]) {
                let from = DATA + 0x8003;
                let to = (from as i64 + away) as u64;
                let mut g = strings(code, from, to, count).flags(if back { f::D } else { 0 });
                fill(&mut g, DATA, 0x10000);
                let mut expected = g.ram.clone();
                moved(&mut expected, from as usize, to as usize, size, count as usize, back);
                let regs = g.done();
                let what = format!("{size} bytes, {away} away, {count}, back {back}");
                assert!(g.ram[DATA as usize..][..0x10000] == expected[DATA as usize..][..0x10000], "{what}");
                let len = count as i64 * size as i64 * if back { -1 } else { 1 };
                let ends = (regs[r::RSI] as i64 - len, regs[r::RDI] as i64 - len, regs[r::RCX]);
                assert_eq!(ends, (from as i64, to as i64, 0), "{what}");
                assert_eq!(g.state.retired, count, "{what}");
            }
        }
    }
}

#[test]
fn an_alias_overlaps_like_any_other_page() {
    // The page after DATA is mapped to DATA again, so that the copy overwrites its own input.
    let mut g = strings(&REP_MOVSB, DATA, DATA + 0x1001, 64);
    g.set_pte(DATA + 0x1000, DATA | 7);
    g.write(DATA, &[7, 1, 2, 3]);
    g.done();
    assert_eq!(g.read(DATA, 65), [7; 65]);
}

#[test]
fn rep_stos_fills_and_counts() {
    for back in [false, true] {
        let mut g = strings(&REP_STOSQ, 0, DATA + 0x5004, 1500).flags(if back { f::D } else { 0 });
        g.state.gpr[r::RAX] = 0x0807_0605_0403_0201;
        g.done();
        let start = if back { DATA + 0x5004 - 1499 * 8 } else { DATA + 0x5004 };
        assert!((0..1500).all(|n| g.read_u64(start + n * 8) == 0x0807_0605_0403_0201));
        assert_eq!((g.read_u64(start - 8), g.read_u64(start + 1500 * 8)), (0, 0));
        assert_eq!(g.state.retired, 1500);
    }
}

#[test]
fn no_iteration_counts_one() {
    let mut g = strings(&REP_MOVSB, 1, 2, 0);
    let regs = g.done();
    assert_eq!((regs[r::RSI], regs[r::RDI], g.state.retired), (1, 2, 1));
}

#[test]
fn a_limit_stops_between_two_iterations_with_rip_on_the_instruction() {
    for limit in 0..=20 {
        let mut g = strings(&REP_MOVSB, DATA, DATA + 0x100, 20);
        fill(&mut g, DATA, 64);
        assert_eq!(g.run_to(limit), Outcome::Exit(CpuExit::Reached));
        let rip = if limit == 20 { CODE + 2 } else { CODE };
        assert_eq!((g.state.retired, g.state.gpr[r::RCX], g.state.rip), (limit, 20 - limit, rip));
        assert_eq!(g.read(DATA + 0x100, 20)[limit as usize..], [0; 20][limit as usize..]);
        g.done();
        assert_eq!(g.state.retired, 20);
        assert_eq!(g.read(DATA + 0x100, 20), &g.ram[DATA as usize..][..20]);
    }
}

#[test]
fn a_fault_leaves_the_iterations_before_it_done() {
    let mut g = strings(&REP_MOVSB, DATA, DATA + 0x1000 + 0x1000 - 10, 20);
    fill(&mut g, DATA, 64);
    g.set_pte(DATA + 0x2000, 0);
    assert_eq!(g.run(), Outcome::Fault { vector: 14, error: Some(2), rip: CODE });
    assert_eq!((g.state.retired, g.state.gpr[r::RCX], g.state.gpr[r::RSI]), (10, 10, DATA + 10));
    assert_eq!(g.state.sys.cr2, DATA + 0x2000);
}

#[test]
fn repe_and_repne_end_on_the_flag() {
    let mut g = strings(&[0xf3, 0xa6], DATA, DATA + 0x100, 10); // repe cmpsb
    g.write(DATA, b"abcdef");
    g.write(DATA + 0x100, b"abcxef");
    let regs = g.done();
    assert_eq!((regs[r::RCX], regs[r::RSI], regs[r::RDI]), (6, DATA + 4, DATA + 0x104));
    assert_eq!(g.state.retired, 4);
    assert_eq!(g.state.rflags & (f::Z | f::C), f::C);

    let mut g = strings(&[0xf2, 0xae], 0, DATA, !0).reg(r::RAX, 0); // repne scasb
    g.write(DATA, b"four");
    let regs = g.done();
    assert_eq!((regs[r::RDI], regs[r::RCX]), (DATA + 5, !0 - 5));
    assert_eq!(g.state.rflags & f::Z, f::Z);

    let mut g = strings(&[0xf3, 0x48, 0xaf], 0, DATA, 4).reg(r::RAX, 1); // repe scasq
    for n in 0..4 {
        g.write_u64(DATA + n * 8, 1);
    }
    assert_eq!(g.done()[r::RCX], 0);
    assert_eq!(g.state.retired, 4);
}

#[test]
fn single_string_instructions_move_by_their_width() {
    let mut g = strings(&[0x48, 0xad, 0xaa, 0x66, 0xa5], DATA, DATA + 0x100, 9); // lodsq; stosb; movsw
    g.write(DATA, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    let regs = g.done();
    assert_eq!(regs[r::RAX], 0x0807_0605_0403_0201);
    assert_eq!((regs[r::RSI], regs[r::RDI], regs[r::RCX]), (DATA + 10, DATA + 0x103, 9));
    assert_eq!(g.read(DATA + 0x100, 3), [1, 9, 10]);
}

#[test]
fn the_source_has_a_segment_and_addresses_may_be_of_32_bits() {
    let mut g = strings(&[0x67, 0xf3, 0x65, 0xa4], 0xf_0000_0100, 0xf << 32 | DATA, 0x5_0000_0002);
    g.state.gs_base = DATA;
    g.write(DATA + 0x100, &[5, 6]);
    let regs = g.done();
    assert_eq!((regs[r::RSI], regs[r::RDI], regs[r::RCX]), (0x102, DATA + 2, 0));
    assert_eq!(g.read(DATA, 2), [5, 6]);
}

#[test]
fn rep_stos_over_code_that_runs_is_seen() {
    // Overwrites, byte by byte, the two instructions after it with NOPs; one of them is already decoded.
    let code = [
        0xb0, 0x90, // mov al, 0x90
        0xf3, 0xaa, // rep stosb
        0x0f, 0x0b, 0x0f, 0x0b, // ud2; ud2
    ];
    let mut g = strings(&code, 0, CODE + 4, 4);
    g.done();
    assert_eq!(g.state.retired, 1 + 4 + 4);
}

#[test]
fn string_instructions_reach_devices_one_iteration_at_a_time() {
    let mut g = strings(&[0xf3, 0xa5], DEVICE + 0x2000, DATA, 3); // rep movsd
    g.cpu.restore(&g.state);
    let limit = soft_cpu::RunLimit { until: 100, interrupt_window: false };
    for n in 0..3 {
        let exit = g.cpu.run(&mut g.ram, &limit);
        assert_eq!(exit, CpuExit::MmioRead { addr: DEVICE + 0x2000 + n * 4, size: 4 });
        assert_eq!(g.cpu.retired(), n);
        assert_eq!(g.cpu.complete(&mut g.ram, 0x1000 + n), None);
        assert_eq!(g.cpu.retired(), n + 1);
    }
    assert_eq!(g.read(DATA, 12), [0, 0x10, 0, 0, 1, 0x10, 0, 0, 2, 0x10, 0, 0]);
}
