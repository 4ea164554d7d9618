//! Compares x87 arithmetic with the host's: results, flags, C1 and unmasked exceptions.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

mod float_cases;

use std::arch::asm;

use float_cases::{Cases, differs_in_underflow, tell_left_out};
use soft_cpu::float::{self, F32, F64, F80, Float, FloatContext, PE, Rounding, transcendental};

const CASES: u32 = 300_000;

/// The state that FNSAVE stored after an instruction.
#[derive(Debug)]
struct Host {
    status: u16,
    stack: [F80; 3],
}

const C0: u16 = 0x100;
const C1: u16 = 0x200;
const C2: u16 = 0x400;
const C3: u16 = 0x4000;

fn bytes(n: F80) -> [u8; 16] {
    (u128::from(n.sign_exp) << 64 | u128::from(n.significand)).to_le_bytes()
}

fn parse(area: &[u8; 108]) -> Host {
    let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let stack = [28, 38, 48].map(|at| F80 {
        significand: u64::from_le_bytes(area[at..at + 8].try_into().unwrap()),
        sign_exp: word(at + 8),
    });
    Host { status: word(4), stack }
}

/// Defines a function that runs one instruction with two registers, a memory operand and a control word.
/// FNSAVE stores the state before a pending exception is delivered, and resets the FPU.
macro_rules! host {
    ($($name:ident: $instruction:literal;)*) => {
        $(fn $name(st0: F80, st1: F80, control: u16, memory: &mut u128) -> Host {
            let (st0, st1, mut area) = (bytes(st0), bytes(st1), [0u8; 108]);
            // SAFETY: reads and writes the given buffers only, and leaves the FPU as it was: reset and empty.
            unsafe {
                asm!(
                    "fninit", "fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]", "fldcw word ptr [{c}]",
                    $instruction, "fnsave [{s}]",
                    a = in(reg) &st0, b = in(reg) &st1, c = in(reg) &control, s = in(reg) &mut area,
                    m = in(reg) memory,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                );
            }
            parse(&area)
        })*
    };
}

host! {
    fadd: "fadd st, st(1) /* {m} */"; fsub: "fsub st, st(1) /* {m} */"; fmul: "fmul st, st(1) /* {m} */";
    fdiv: "fdiv st, st(1) /* {m} */"; fsqrt: "fsqrt /* {m} */"; frndint: "frndint /* {m} */";
    fprem: "fprem /* {m} */"; fprem1: "fprem1 /* {m} */"; fscale: "fscale /* {m} */"; fxtract: "fxtract /* {m} */";
    fcom: "fcom st(1) /* {m} */"; fucom: "fucom st(1) /* {m} */"; fxam: "fxam /* {m} */";
    fadd32: "fadd dword ptr [{m}]"; fmul64: "fmul qword ptr [{m}]"; fdiv32: "fdiv dword ptr [{m}]";
    fld32: "fld dword ptr [{m}]"; fld64: "fld qword ptr [{m}]"; fild64: "fild qword ptr [{m}]";
    fbld: "fbld [{m}]";
    fst32: "fst dword ptr [{m}]"; fst64: "fst qword ptr [{m}]"; fbstp: "fbstp [{m}]";
    fist16: "fist word ptr [{m}]"; fist32: "fist dword ptr [{m}]"; fistp64: "fistp qword ptr [{m}]";
    fisttp64: "fisttp qword ptr [{m}]";
    f2xm1: "f2xm1 /* {m} */"; fyl2x: "fyl2x /* {m} */"; fyl2xp1: "fyl2xp1 /* {m} */"; fpatan: "fpatan /* {m} */";
    fptan: "fptan /* {m} */"; fsin: "fsin /* {m} */"; fcos: "fcos /* {m} */";
}

type HostFn = fn(F80, F80, u16, &mut u128) -> Host;

/// A random control word: precision, rounding, masks (usually all masked).
fn random_control(cases: &mut Cases) -> u16 {
    let n = cases.next() as u16;
    n & 0x0f00 | if n >> 12 < 4 { n & 0x3f } else { 0x3f }
}

/// The bits of the status word that correspond to `cx`, without those of the stack.
fn status(cx: &FloatContext) -> u16 {
    let summary = if cx.unmasked() != 0 { 0x8080 } else { 0 };
    let c1 = if cx.rounded_up && cx.flags & PE != 0 && !cx.no_result() { C1 } else { 0 };
    u16::from(cx.raised()) | summary | c1
}

const FLAGS: u16 = 0x80bf;

fn check(name: &str, host: HostFn, with_c1: bool, ours: fn(F80, F80, &mut FloatContext) -> F80) {
    let (mut cases, mut left_out) = (Cases(1), 0);
    for _ in 0..CASES {
        let (a, b) = cases.f80_pair();
        let control = random_control(&mut cases);
        if name == "fscale" && differs_in_underflow(a, control) {
            left_out += 1;
            continue;
        }
        let mut cx = FloatContext::from_control_word(control);
        let value = ours(a, b, &mut cx);
        let value = if cx.no_result() { a } else { value };
        let host = host(a, b, control, &mut 0);
        let mask = FLAGS | if with_c1 { C1 } else { 0 };
        assert_eq!(
            (value, status(&cx) & mask),
            (host.stack[0], host.status & mask),
            "{name} {a:x?} {b:x?} control {control:#x}; host {host:x?}"
        );
    }
    tell_left_out(name, left_out);
}

#[test]
fn arithmetic() {
    check("fadd", fadd, true, |a, b, cx| float::add(a.operand(), b.operand(), cx));
    check("fsub", fsub, true, |a, b, cx| float::sub(a.operand(), b.operand(), cx));
    check("fmul", fmul, true, |a, b, cx| float::mul(a.operand(), b.operand(), cx));
    check("fdiv", fdiv, true, |a, b, cx| float::div(a.operand(), b.operand(), cx));
    check("fsqrt", fsqrt, true, |a, _, cx| float::sqrt(a.operand(), cx));
    check("frndint", frndint, true, |a, _, cx| float::round_to_integral(a.operand(), cx.rounding, true, cx));
    check("fscale", fscale, true, float::scale);
}

#[test]
fn remainders() {
    for (host, nearest) in [(fprem as HostFn, false), (fprem1, true)] {
        let (mut cases, mut left_out) = (Cases(2), 0);
        for _ in 0..CASES {
            let (a, b) = cases.f80_pair();
            let control = random_control(&mut cases);
            if differs_in_underflow(a, control) {
                left_out += 1;
                continue;
            }
            let mut cx = FloatContext::from_control_word(control);
            let ours = float::remainder(a, b, nearest, &mut cx);
            let value = if cx.no_result() { a } else { ours.value };
            let q = u16::from(ours.quotient.unwrap_or(0));
            let mut codes = (q >> 2 & 1) * C0 | (q >> 1 & 1) * C3 | (q & 1) * C1;
            codes |= u16::from(ours.incomplete) * C2;
            let host = host(a, b, control, &mut 0);
            let mask = FLAGS | if cx.no_result() { 0 } else { C0 | C1 | C2 | C3 };
            assert_eq!(
                (value, (status(&cx) | codes) & mask),
                (host.stack[0], host.status & mask),
                "nearest {nearest} {a:x?} {b:x?} control {control:#x}; {ours:x?} host {host:x?}"
            );
        }
        tell_left_out(if nearest { "fprem1" } else { "fprem" }, left_out);
    }
}

#[test]
fn extraction() {
    let mut cases = Cases(3);
    for _ in 0..CASES {
        let a = cases.f80();
        let control = random_control(&mut cases);
        let mut cx = FloatContext::from_control_word(control);
        let (exponent, significand) = float::extract(a, &mut cx);
        let host = fxtract(a, F80::ONE, control, &mut 0);
        if cx.no_result() {
            assert_eq!(host.stack[0], a);
        } else {
            assert_eq!(
                [significand, exponent],
                host.stack[..2],
                "{a:x?} control {control:#x}; host {host:x?}"
            );
        }
        assert_eq!(status(&cx) & FLAGS, host.status & FLAGS, "{a:x?} control {control:#x}; host {host:x?}");
    }
}

#[test]
fn comparisons() {
    for (host, quiet) in [(fcom as HostFn, false), (fucom, true)] {
        let mut cases = Cases(4);
        for _ in 0..CASES {
            let (a, b) = cases.f80_pair();
            let mut cx = FloatContext::from_control_word(random_control(&mut cases) | 0x3f);
            let codes = match float::compare(a.operand(), b.operand(), quiet, &mut cx) {
                None => C0 | C2 | C3,
                Some(std::cmp::Ordering::Less) => C0,
                Some(std::cmp::Ordering::Equal) => C3,
                Some(std::cmp::Ordering::Greater) => 0,
            };
            let host = host(a, b, 0x37f, &mut 0);
            let mask = FLAGS | C0 | C2 | C3;
            assert_eq!(status(&cx) | codes, host.status & mask, "{a:x?} {b:x?} quiet {quiet}");
        }
    }
}

#[test]
fn memory_operands() {
    type Ours = fn(F80, u64, &mut FloatContext) -> F80;
    let table: [(HostFn, bool, Ours); 5] = [
        (fadd32, false, |a, m, cx| float::add(a.operand(), F32(m as u32).unpack(cx), cx)),
        (fdiv32, false, |a, m, cx| float::div(a.operand(), F32(m as u32).unpack(cx), cx)),
        (fmul64, true, |a, m, cx| float::mul(a.operand(), F64(m).unpack(cx), cx)),
        (fld32, false, |_, m, cx| float::load(F32(m as u32).unpack(cx), cx)),
        (fld64, true, |_, m, cx| float::load(F64(m).unpack(cx), cx)),
    ];
    for (i, (host, double, ours)) in table.into_iter().enumerate() {
        let mut cases = Cases(5);
        for _ in 0..CASES {
            let a = cases.f80();
            let m = if double { cases.f64() } else { cases.f32().into() };
            let control = random_control(&mut cases);
            let mut cx = FloatContext::from_control_word(control);
            let value = ours(a, m, &mut cx);
            let is_load = i >= 3;
            let lost = if is_load { cx.unmasked() & float::IE != 0 } else { cx.no_result() };
            let value = if lost { a } else { value };
            let host = host(a, F80::ONE, control, &mut m.into());
            assert_eq!(
                (value, status(&cx)),
                (host.stack[0], host.status & (FLAGS | C1)),
                "{i}: {a:x?} {m:#x} control {control:#x}; host {host:x?}"
            );
        }
    }
}

#[test]
fn stores() {
    type Ours = fn(F80, &mut FloatContext) -> u128;
    let table: [(HostFn, u32, Ours); 7] = [
        (fst32, 32, |a, cx| float::store::<F32>(a, cx).0.into()),
        (fst64, 64, |a, cx| float::store::<F64>(a, cx).0.into()),
        (fbstp, 80, float::to_bcd),
        (fist16, 16, |a, cx| float::to_int(a.operand(), 16, cx.rounding, cx) as u128),
        (fist32, 32, |a, cx| float::to_int(a.operand(), 32, cx.rounding, cx) as u128),
        (fistp64, 64, |a, cx| float::to_int(a.operand(), 64, cx.rounding, cx) as u128),
        (fisttp64, 64, |a, cx| float::to_int(a.operand(), 64, Rounding::Zero, cx) as u128),
    ];
    for (host, bits, ours) in table {
        let mut cases = Cases(6);
        for _ in 0..CASES {
            let a = cases.f80();
            let control = random_control(&mut cases);
            let mut cx = FloatContext::from_control_word(control);
            let value = ours(a, &mut cx) & u128::MAX >> (128 - bits);
            let mut memory = 0;
            let host = host(a, F80::ONE, control, &mut memory);
            assert_eq!(
                status(&cx),
                host.status & (FLAGS | C1),
                "{bits} bits of {a:x?} control {control:#x}; host {host:x?}"
            );
            if cx.unmasked() & !PE == 0 {
                assert_eq!(value, memory, "{bits} bits of {a:x?} control {control:#x}; host {host:x?}");
            } else {
                assert_eq!(memory, 0, "{bits} bits of {a:x?} control {control:#x}; host {host:x?}");
            }
        }
    }
}

#[test]
fn integers_and_bcd() {
    let mut cases = Cases(7);
    for _ in 0..CASES {
        let n = cases.integer();
        let ours: F80 = float::from_int(n, &mut FloatContext::from_control_word(0x37f));
        assert_eq!(ours, fild64(F80::ONE, F80::ONE, 0x37f, &mut (n as u64).into()).stack[0]);
        let mut rest = n.unsigned_abs();
        let mut bcd = u128::from(n < 0) << 79;
        for i in 0..18 {
            bcd |= u128::from(rest % 10) << (4 * i);
            rest /= 10;
        }
        assert_eq!(
            float::from_bcd(bcd),
            fbld(F80::ONE, F80::ONE, 0x37f, &mut bcd.clone()).stack[0],
            "{bcd:#x}"
        );
    }
}

/// The distance of two numbers in units in the last place, if they have the same sign.
fn distance(a: F80, b: F80) -> u128 {
    let line = |n: F80| u128::from(n.sign_exp & 0x7fff) << 63 | u128::from(n.significand & u64::MAX >> 1);
    if a.sign_exp >> 15 == b.sign_exp >> 15 { line(a).abs_diff(line(b)) } else { u128::MAX }
}

/// The error of the host's transcendental functions is about one unit in the last place, and the soft CPU's
/// results must be near them; NaNs, infinities, zeros and the flags IE, DE and ZE must be the same.
#[test]
fn transcendentals() {
    type Ours = fn(F80, F80, &mut FloatContext) -> F80;
    let table: [(&str, HostFn, Ours); 7] = [
        ("f2xm1", f2xm1, |a, _, cx| transcendental::f2xm1(a, cx)),
        ("fyl2x", fyl2x, |a, b, cx| transcendental::fyl2x(b, a, cx)),
        ("fyl2xp1", fyl2xp1, |a, b, cx| transcendental::fyl2xp1(b, a, cx)),
        ("fpatan", fpatan, |a, b, cx| transcendental::fpatan(b, a, cx)),
        ("fptan", fptan, |a, _, cx| transcendental::fptan(a, cx).unwrap_or(a)),
        ("fsin", fsin, |a, _, cx| transcendental::fsin(a, cx).unwrap_or(a)),
        ("fcos", fcos, |a, _, cx| transcendental::fcos(a, cx).unwrap_or(a)),
    ];
    for (name, host, ours) in table {
        let mut cases = Cases(8);
        let mut worst = 0;
        for _ in 0..CASES / 4 {
            let (mut a, b) = cases.f80_pair();
            let unbiased = i32::from(a.sign_exp & 0x7fff) - 16383;
            // The host reduces by a π of 66 bits, and its results are undefined below -1 in FYL2XP1 and
            // beyond ±1 in F2XM1.
            let top = match name {
                "f2xm1" | "fsin" | "fcos" | "fptan" => -1,
                "fyl2xp1" => -3,
                _ => i32::MAX,
            };
            if unbiased > top && unbiased < 16384 {
                a.sign_exp = a.sign_exp & 0x8000 | (16383 + top) as u16;
            }
            let mut cx = FloatContext::from_control_word(0x37f);
            let value = ours(a, b, &mut cx);
            let host = host(a, b, 0x37f, &mut 0);
            let host_value =
                if name == "fptan" && host.status & C2 == 0 { host.stack[1] } else { host.stack[0] };
            let apart = if value == host_value { 0 } else { distance(value, host_value) };
            worst = worst.max(apart);
            assert!(apart <= 2, "{name} {a:x?} {b:x?}: {value:x?}, host {host:x?}");
            assert_eq!(
                cx.flags & 7,
                host.status as u8 & 7,
                "{name} {a:x?} {b:x?}: {value:x?} host {host:x?}"
            );
        }
        println!("{name}: at most {worst} units apart");
    }
}

/// FXAM reports the same classes as the host.
#[test]
fn classes() {
    use float::FloatClass;
    let mut cases = Cases(9);
    for _ in 0..CASES {
        let a = cases.f80();
        let codes = match a.operand().class {
            FloatClass::Unsupported => 0,
            FloatClass::Quiet | FloatClass::Signaling => C0,
            FloatClass::Normal => C2,
            FloatClass::Infinity => C0 | C2,
            FloatClass::Zero => C3,
            FloatClass::Denormal => C2 | C3,
        };
        assert_eq!(codes, fxam(a, a, 0x37f, &mut 0).status & (C0 | C2 | C3), "{a:x?}");
    }
}
