//! Random programs of everything that makes exact stopping hard: faults, traps, REP, devices, ports,
//! interrupts, stale translations, breakpoints, self-modifying code. Single steps are the reference; runs to
//! random counts, and runs that save and restore in between, have to give the same state, RAM and questions.
//!
//! Each item of a program has 16 bytes, so that the handler of a fault can continue with the next item.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use soft_cpu::{CpuExit, CpuState};

use crate::guest::*;

const PROGRAMS: u64 = 100;
const ITEMS: u64 = 48;
const ITEM: usize = 16;
const IF: u64 = 1 << 9;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// An address within a few pages of data, usually at the edges of a page. The third page is a device, the
/// fifth cannot be written, the sixth is not mapped.
fn address(r: &mut Rng) -> i32 {
    let page = DATA + r.below(6) * 0x1000;
    let within = r.pick(&[0, 8, 0x7f8, 0xff8, 0xffc, 0xfff]);
    (page + within) as i32
}

fn item(a: &mut CodeAssembler, r: &mut Rng) -> Result<(), IcedError> {
    let at = address(r);
    match r.below(26) {
        0 => a.add(qword_ptr(at), rax),
        1 => a.mov(rcx, qword_ptr(at)),
        2 => a.mov(dword_ptr(at), ecx),
        3 => a.xadd(word_ptr(at), dx),
        4 => a.push(qword_ptr(at)),
        5 => a.pop(qword_ptr(at)),
        6 => {
            a.mov(ecx, r.below(9) as u32)?;
            a.mov(edi, at)?;
            if r.below(2) == 0 { a.rep().stosq() } else { a.rep().stosb() }
        }
        7 => {
            a.mov(esi, at)?;
            a.mov(ecx, 5)?;
            a.rep().movsw()
        }
        8 => a.in_(al, 0x60),
        9 => a.out(0x61, eax),
        10 => {
            a.mov(edx, 0x1f0)?;
            a.mov(ecx, 3)?;
            a.rep().outsb()
        }
        11 => a.ud2(),
        12 => a.int3(),
        13 => a.int(0x60),
        14 => a.div(dl),
        15 => a.sti(),
        16 => a.cli(),
        17 => {
            a.mov(rdx, cr3)?;
            a.mov(cr3, rdx)
        }
        18 => a.invlpg(byte_ptr(at)),
        // Maps another page of data in place of the first, without invalidating; accessed bits are cleared.
        19 => a.xor(byte_ptr(PT + DATA / 4096 * 8 + 1), 0x10),
        20 => a.and(byte_ptr(PT + (at as u64) / 4096 * 8), !0x20),
        // Changes the immediate of an item of kind 22; in other items, see `program`.
        21 => a.inc(byte_ptr(CODE + r.below(ITEMS) * ITEM as u64 + 1)),
        22 => a.db(&[0x05, 1, 0, 0, 0]),
        23 => {
            a.push(r.pick(&[0x102, 0x302, 0x202, 0x2, 0x602]))?;
            a.popfq()
        }
        24 => {
            a.mov(edx, ss)?;
            a.mov(ss, edx)
        }
        _ => {
            a.rdtsc()?;
            a.adc(rax, rdx)
        }
    }
}

fn program(r: &mut Rng) -> Vec<u8> {
    let mut code = Vec::new();
    let mut changed = Vec::new();
    for n in 0..ITEMS {
        let mut one = assemble(|a| item(a, r));
        // Only items of kind 22 can be changed safely; other stores go to the data.
        if one.starts_with(&[0xfe, 0x04, 0x25]) {
            changed.push(n as usize);
        }
        assert!(one.len() <= ITEM, "{one:x?}");
        one.resize(ITEM, 0x90);
        code.extend(one);
    }
    for n in changed {
        let aim = code.chunks(ITEM).position(|item| item[0] == 0x05).unwrap_or(0) * ITEM;
        let aim = if code[aim] == 0x05 { CODE as usize + aim + 1 } else { DATA as usize };
        code[n * ITEM + 3..n * ITEM + 7].copy_from_slice(&(aim as u32).to_le_bytes());
    }
    let mut again = assemble(|a| {
        a.dec(byte_ptr(DATA + 0x8000))?;
        a.db(&[0x0f, 0x85])?;
        a.dd_i(&[-(ITEMS as i32 * ITEM as i32 + 13)])
    });
    again.resize(ITEM, 0x90);
    code.extend(again);
    // After a trap at the end the handler may continue beyond it.
    let mut end = assemble(|a| a.mov(byte_ptr(END), bl));
    end.resize(ITEM, 0x90);
    code.extend(end.repeat(8));
    code
}

fn start(seed: u64) -> Guest {
    let mut r = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut g = Guest::new(&program(&mut r)).flags(IF);
    for v in 0..256u64 {
        let handler = assemble(|a| {
            if matches!(v, 8 | 10..=14 | 17) {
                a.add(rsp, 8)?;
            }
            if v < 32 {
                a.add(qword_ptr(rsp), 16)?;
                a.and(qword_ptr(rsp), -16)?;
            }
            a.iretq()
        });
        g.write(HANDLERS + 16 * v, &handler);
    }
    g.write(DATA + 0x8000, &[3]);
    g.set_pte(DATA + 0x2000, DEVICE | 0x2007);
    g.set_pte(DATA + 0x4000, (DATA + 0x4000) | 5);
    g.set_pte(DATA + 0x5000, 0);
    if r.below(3) == 0 {
        g.state.sys.dr = [DATA + 8, CODE + 16 * r.below(ITEMS), DATA + 0xff8, 0];
        // A write, an execution, and an access of 8 bytes.
        g.state.sys.dr7 = 0x415 | 1 << 16 | 0xb << 24;
    }
    g.cpu.restore(&g.state);
    g
}

/// A running guest, with its questions so far.
struct Run {
    guest: Guest,
    log: Vec<CpuExit>,
    over: bool,
}

impl Run {
    fn new(seed: u64) -> Run {
        Run { guest: start(seed), log: Vec::new(), over: false }
    }

    /// Continues to instruction `k`, with an interrupt at every 37th instruction at which one can be taken.
    fn go(&mut self, k: u64) {
        while !self.over && self.guest.cpu.retired() < k {
            let next = (self.guest.cpu.retired() / 37 + 1) * 37;
            self.over = !self.guest.drive(k.min(next), &mut self.log);
            if !self.over && next <= k && self.guest.cpu.interruptible() {
                self.guest.cpu.inject(0x40);
            }
        }
    }

    fn state(&self) -> CpuState {
        self.guest.cpu.save()
    }

    #[track_caller]
    fn same(&self, other: &Run, what: &str) {
        assert_eq!(self.over, other.over, "{what}: one has ended");
        assert_eq!(self.state(), other.state(), "{what}: state");
        assert!(self.guest.ram == other.guest.ram, "{what}: RAM");
        assert_eq!(self.log, other.log, "{what}: questions");
    }
}

#[test]
fn random_programs_come_to_the_same_states_however_they_are_run() {
    let mut kinds = [0; 4];
    for seed in 1..=PROGRAMS {
        let mut r = Rng(seed << 32 | 77);
        let mut stops: Vec<u64> = (0..6).map(|_| 1 + r.below(400)).collect();
        stops.push(100_000);
        stops.sort();
        let (mut steps, mut restored) = (Run::new(seed), Run::new(seed));
        for k in stops {
            while !steps.over && steps.guest.cpu.retired() < k {
                steps.go(steps.guest.cpu.retired() + 1);
            }
            restored.go(k);
            let mut whole = Run::new(seed);
            whole.go(k);
            whole.same(&steps, &format!("program {seed} at {k}, in one go"));
            restored.same(&steps, &format!("program {seed} at {k}, restored"));
            let state = restored.state();
            restored.guest.cpu.restore(&state);
        }
        let state = steps.state();
        assert!(steps.over, "program {seed} does not end: {:#x}", state.rip);
        kinds[0] += steps.log.iter().any(|q| matches!(q, CpuExit::MmioWrite { .. })) as u64;
        kinds[1] += steps.log.iter().any(|q| matches!(q, CpuExit::PioIn { .. })) as u64;
        kinds[2] += (state.sys.cr2 != 0) as u64;
        kinds[3] += (state.retired > 200) as u64;
    }
    // All kinds of exits have occurred often.
    assert!(kinds.iter().all(|n| *n > PROGRAMS / 3), "{kinds:?}");
}
