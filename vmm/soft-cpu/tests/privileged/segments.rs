//! Loading segment registers, and the instructions that examine descriptors.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::*;

/// Selectors and descriptors that the tests add to the GDT.
const GDT_END: u64 = GDT + 0x40;
const EXTRA: u16 = 0x40;

fn with(descriptor: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
    let mut g = Guest::asm(f);
    g.write_u64(GDT_END, descriptor);
    g.write_u64(GDT_END + 8, 0);
    g.state.sys.gdtr.limit = 0x4f;
    g
}

const DATA_3: u64 = 0x00cf_f300_0000_ffff;
const DATA_0: u64 = 0x00cf_9300_0000_ffff;
const ABSENT: u64 = 1 << 47;

#[test]
fn data_segments_are_checked() {
    for (descriptor, selector, user, outcome) in [
        (DATA_3, EXTRA, false, None),
        (DATA_3, EXTRA | 3, true, None),
        (DATA_0, EXTRA, true, Some((13, EXTRA))),
        (DATA_0, EXTRA | 3, false, Some((13, EXTRA))),
        (DATA_3 & !ABSENT, EXTRA, false, Some((11, EXTRA))),
        // Readable and execute-only code segments.
        (0x00af_fa00_0000_ffff, EXTRA | 3, true, None),
        (0x00af_f800_0000_ffff, EXTRA | 3, true, Some((13, EXTRA))),
        // A conforming code segment of ring 0.
        (0x00af_9e00_0000_ffff, EXTRA | 3, true, None),
        // A system segment; a selector beyond the limit; a selector in an LDT that does not exist.
        (0x0000_8900_0000_0067, EXTRA, false, Some((13, EXTRA))),
        (DATA_3, 0x50, false, Some((13, 0x50))),
        (DATA_3, 0x0c, false, Some((13, 0x0c))),
        // The null selector.
        (DATA_3, 3, true, None),
    ] {
        let g = with(descriptor, |a| a.mov(fs, ax)).reg(0, selector as u64);
        let mut g = if user { g.user() } else { g };
        let expected = match outcome {
            None => Outcome::Done,
            Some((vector, error)) => Outcome::Fault { vector, error: Some(error as u32), rip: CODE },
        };
        assert_eq!(g.run(), expected, "{descriptor:#x} {selector:#x} user {user}");
    }
}

#[test]
fn a_load_takes_the_base_and_marks_the_descriptor_accessed() {
    let mut g = with(0x12cf_f234_5678_ffff, |a| a.mov(gs, ax)).reg(0, EXTRA as u64);
    g.state.gs_base = 0xffff_8000_0000_0000;
    g.done();
    assert_eq!(g.state.gs_base, 0x1234_5678);
    assert_eq!(g.read_u64(GDT_END), 0x12cf_f334_5678_ffff);
    // A null selector clears the base.
    let mut g = Guest::asm(|a| a.mov(gs, ax));
    g.state.gs_base = 0xffff_8000_0000_0000;
    g.done();
    assert_eq!((g.state.gs_base, g.state.sys.seg[5].selector), (0, 0));
}

#[test]
fn the_stack_segment_is_checked() {
    let load = |descriptor, selector: u16, user: bool| {
        let g = with(descriptor, |a| a.mov(ss, ax)).reg(0, selector as u64);
        if user { g.user() } else { g }.run()
    };
    for (descriptor, selector, user, outcome) in [
        (DATA_0, EXTRA, false, None),
        (DATA_0, 0, false, None),
        (DATA_0, 1, false, Some((13, 0))),
        (DATA_0, 3, true, Some((13, 0))),
        (DATA_0, EXTRA | 3, false, Some((13, EXTRA))),
        (DATA_3, EXTRA, false, Some((13, EXTRA))),
        (DATA_3, EXTRA | 3, true, None),
        (DATA_0 & !ABSENT, EXTRA, false, Some((12, EXTRA))),
        // Not writable.
        (0x00cf_9100_0000_ffff, EXTRA, false, Some((13, EXTRA))),
    ] {
        let expected = match outcome {
            None => Outcome::Done,
            Some((vector, error)) => Outcome::Fault { vector, error: Some(error as u32), rip: CODE },
        };
        assert_eq!(load(descriptor, selector, user), expected, "{descriptor:#x} {selector:#x} user {user}");
    }
}

#[test]
fn segment_registers_are_stored_with_the_operands_width() {
    let mut g = Guest::asm(|a| {
        a.mov(ax, ds)?;
        a.mov(ecx, ds)?;
        a.mov(rdx, ds)?;
        a.mov(word_ptr(DATA), ds)?;
        a.push(fs)?;
        a.pop(gs)
    });
    for r in [0, 1, 2] {
        g = g.reg(r, u64::MAX);
    }
    g.write_u64(DATA, u64::MAX);
    let r = g.done();
    assert_eq!((r[0], r[1], r[2]), (!0xffff | 0x10, 0x10, 0x10));
    assert_eq!(g.read_u64(DATA), !0xffff | 0x10);
    assert_eq!(g.read_u64(STACK - 8), 0x10);
    assert_eq!(r[4], STACK);
}

#[test]
fn far_pointers_load_a_segment_and_a_register() {
    let mut g = with(0x12cf_f334_5678_ffff, |a| a.lfs(rax, ptr(DATA)));
    g.write_u64(DATA, 0x1122_3344_5566_7788);
    g.write(DATA + 8, &EXTRA.to_le_bytes());
    assert_eq!(g.done()[0], 0x1122_3344_5566_7788);
    assert_eq!(g.state.fs_base, 0x1234_5678);
}

#[test]
fn task_register_and_ldt() {
    // An available TSS becomes busy, and a busy one cannot be loaded.
    let mut g = with(0x1200_8934_5678_0067, |a| {
        a.ltr(ax)?;
        a.str(ecx)
    })
    .reg(0, EXTRA as u64);
    g.write_u64(GDT_END + 8, 0xffff_8000);
    assert_eq!(g.done()[1], EXTRA as u64);
    assert_eq!(g.read_u64(GDT_END), 0x1200_8b34_5678_0067);
    assert_eq!(g.state.sys.tr.base, 0xffff_8000_1234_5678);
    let fault = |vector, error: u16| Outcome::Fault { vector, error: Some(error as u32), rip: CODE };
    let mut g = with(0x0000_8b00_0000_0067, |a| a.ltr(ax)).reg(0, EXTRA as u64);
    assert_eq!(g.run(), fault(13, EXTRA));
    let mut g = with(0x0000_0900_0000_0067, |a| a.ltr(ax)).reg(0, EXTRA as u64);
    assert_eq!(g.run(), fault(11, EXTRA));
    assert_eq!(Guest::asm(|a| a.ltr(ax)).run(), fault(13, 0));
    assert_eq!(with(0, |a| a.ltr(ax)).reg(0, 0x48).run(), fault(13, 0x48));
    // An LDT, and a segment in it.
    let mut g = with(0x0000_8204_1000_000f, |a| {
        a.lldt(ax)?;
        a.sldt(edx)?;
        a.mov(fs, cx)
    })
    .reg(0, EXTRA as u64)
    .reg(1, 0x0c);
    g.write_u64(DATA + 0x1008, 0x00cf_f300_1000_ffff);
    assert_eq!(g.done()[2], EXTRA as u64);
    assert_eq!(g.state.fs_base, 0x1000);
}

#[test]
fn descriptors_can_be_examined() {
    const ZF: u64 = 0x40;
    let look = |descriptor: u64, user: bool| {
        let g = with(descriptor, |a| {
            a.lar(ecx, eax)?;
            a.setz(sil)?;
            a.lsl(edx, eax)?;
            a.setz(dil)?;
            a.verr(ax)?;
            a.setz(r8b)?;
            a.verw(ax)?;
            a.setz(r9b)
        })
        .reg(0, EXTRA as u64)
        .flags(ZF);
        let r = if user { g.user() } else { g }.done();
        (r[1], r[2], [r[6], r[7], r[8], r[9]].map(|v| v & 1))
    };
    assert_eq!(look(DATA_3, true), (0xcf_f300 & 0xff_ff00, 0xffff_ffff, [1, 1, 1, 1]));
    assert_eq!(look(DATA_0, false), (0xcf_9300, 0xffff_ffff, [1, 1, 1, 1]));
    // Ring 3 cannot examine segments of ring 0.
    assert_eq!(look(DATA_0, true), (0, 0, [0, 0, 0, 0]));
    // Code may be readable but is never writable; a limit in bytes.
    assert_eq!(look(0x002f_fa00_0000_1234, true), (0x2f_fa00, 0xf_1234, [1, 1, 1, 0]));
    // A TSS has rights and a limit but cannot be read as a segment; a call gate has no limit.
    assert_eq!(look(0x0000_8900_0000_0067, false), (0x8900, 0x67, [1, 1, 0, 0]));
    assert_eq!(look(0x0000_8c00_0000_0067, false), (0x8c00, 0, [1, 0, 0, 0]));
    assert_eq!(look(0x0000_8e00_0000_0067, false), (0, 0, [0, 0, 0, 0]));
}
