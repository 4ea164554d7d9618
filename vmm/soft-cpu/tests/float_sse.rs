//! Compares SSE arithmetic with the host's, including flags.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

mod float_cases;

use std::arch::{asm, x86_64::__m128i};
use std::cmp;
use std::mem::transmute;
use std::sync::atomic::{AtomicU32, Ordering};

use float_cases::Cases;
use soft_cpu::float::{self, F32, F64, Float, FloatContext, Operand, Predicate, Rounding};

const CASES: u32 = 400_000;

fn vector(low: u64) -> __m128i {
    // SAFETY: both are 128 bits without invalid values.
    unsafe { transmute(u128::from(low)) }
}

fn low(v: __m128i) -> u64 {
    // SAFETY: as above.
    unsafe { transmute::<__m128i, u128>(v) as u64 }
}

/// Defines a function that runs one instruction on xmm0, xmm1 and rax under an MXCSR; it returns xmm0, rax,
/// the arithmetic flags and MXCSR.
macro_rules! host {
    ($($name:ident: $instruction:literal;)*) => {
        $(fn $name(a: u64, b: u64, rax: u64, mxcsr: u32) -> Host {
            let (xmm0, mut rax, flags, mut mxcsr, standard) = (vector(a), rax, 0u64, mxcsr, 0x1f80u32);
            let (mut xmm0, mut flags): (__m128i, u64) = (xmm0, flags);
            // SAFETY: changes the named registers and restores MXCSR; all exceptions are masked.
            unsafe {
                asm!(
                    "ldmxcsr [{m}]", $instruction, "pushfq", "pop {f}", "stmxcsr [{m}]", "ldmxcsr [{s}]",
                    m = in(reg) &mut mxcsr, s = in(reg) &standard, f = inout(reg) flags,
                    inout("xmm0") xmm0, in("xmm1") vector(b), inout("rax") rax,
                );
            }
            Host { xmm0: low(xmm0), rax, flags: flags & 0x45, raised: mxcsr as u8 & 0x3f }
        })*
    };
}

#[derive(Debug)]
struct Host {
    xmm0: u64,
    rax: u64,
    flags: u64,
    raised: u8,
}

host! {
    addss: "addss xmm0, xmm1"; subss: "subss xmm0, xmm1"; mulss: "mulss xmm0, xmm1"; divss: "divss xmm0, xmm1";
    minss: "minss xmm0, xmm1"; maxss: "maxss xmm0, xmm1"; sqrtss: "sqrtss xmm0, xmm1";
    addsd: "addsd xmm0, xmm1"; subsd: "subsd xmm0, xmm1"; mulsd: "mulsd xmm0, xmm1"; divsd: "divsd xmm0, xmm1";
    minsd: "minsd xmm0, xmm1"; maxsd: "maxsd xmm0, xmm1"; sqrtsd: "sqrtsd xmm0, xmm1";
    comiss: "comiss xmm0, xmm1"; ucomiss: "ucomiss xmm0, xmm1";
    comisd: "comisd xmm0, xmm1"; ucomisd: "ucomisd xmm0, xmm1";
    cvtss2sd: "cvtss2sd xmm0, xmm1"; cvtsd2ss: "cvtsd2ss xmm0, xmm1";
    cvtss2si32: "cvtss2si eax, xmm1"; cvtss2si64: "cvtss2si rax, xmm1";
    cvttss2si32: "cvttss2si eax, xmm1"; cvttss2si64: "cvttss2si rax, xmm1";
    cvtsd2si32: "cvtsd2si eax, xmm1"; cvtsd2si64: "cvtsd2si rax, xmm1";
    cvttsd2si32: "cvttsd2si eax, xmm1"; cvttsd2si64: "cvttsd2si rax, xmm1";
    cvtsi2ss32: "cvtsi2ss xmm0, eax"; cvtsi2ss64: "cvtsi2ss xmm0, rax";
    cvtsi2sd32: "cvtsi2sd xmm0, eax"; cvtsi2sd64: "cvtsi2sd xmm0, rax";
    rcpss: "rcpss xmm0, xmm1"; rsqrtss: "rsqrtss xmm0, xmm1";
    cmpss0: "cmpss xmm0, xmm1, 0"; cmpss1: "cmpss xmm0, xmm1, 1"; cmpss2: "cmpss xmm0, xmm1, 2";
    cmpss3: "cmpss xmm0, xmm1, 3"; cmpss4: "cmpss xmm0, xmm1, 4"; cmpss5: "cmpss xmm0, xmm1, 5";
    cmpss6: "cmpss xmm0, xmm1, 6"; cmpss7: "cmpss xmm0, xmm1, 7";
    roundss0: "roundss xmm0, xmm1, 0"; roundss1: "roundss xmm0, xmm1, 1"; roundss2: "roundss xmm0, xmm1, 2";
    roundss3: "roundss xmm0, xmm1, 3"; roundss4: "roundss xmm0, xmm1, 4";
    roundsd0: "roundsd xmm0, xmm1, 0"; roundsd1: "roundsd xmm0, xmm1, 1"; roundsd2: "roundsd xmm0, xmm1, 2";
    roundsd3: "roundsd xmm0, xmm1, 3"; roundsd4: "roundsd xmm0, xmm1, 4";
}

/// An MXCSR with all exceptions masked and random rounding, DAZ and FTZ.
fn random_mxcsr(cases: &mut Cases) -> u32 {
    0x1f80 | cases.next() as u32 & 0xe040
}

type HostFn = fn(u64, u64, u64, u32) -> Host;

/// Compares the bits of the result that `ours` returns with the low `width` bits of xmm0.
fn check<F>(name: &str, seed: u64, host: HostFn, mask: u64, pair: fn(&mut Cases) -> (u64, u64), ours: F)
where
    F: Fn(u64, u64, &mut FloatContext) -> u64,
{
    let mut cases = Cases(seed);
    for _ in 0..CASES {
        let (a, b) = pair(&mut cases);
        let mxcsr = random_mxcsr(&mut cases);
        let mut cx = FloatContext::from_mxcsr(mxcsr);
        let value = ours(a, b, &mut cx);
        let host = host(a, b, 0, mxcsr);
        assert_eq!(
            (value, cx.raised()),
            (host.xmm0 & mask, host.raised),
            "{name} {a:#x}, {b:#x}, mxcsr {mxcsr:#x}: {value:#x} flags {:#x}; host {host:#x?}",
            cx.raised()
        );
    }
}

fn singles(cases: &mut Cases) -> (u64, u64) {
    let (a, b) = cases.f32_pair();
    (a.into(), b.into())
}

fn doubles(cases: &mut Cases) -> (u64, u64) {
    cases.f64_pair()
}

type Arith<F> = fn(F, F, &mut FloatContext) -> F;

#[test]
fn arithmetic_of_singles() {
    let table: [(&str, HostFn, Arith<F32>); 6] = [
        ("addss", addss, |a, b, cx| float::add(a.unpack(cx), b.unpack(cx), cx)),
        ("subss", subss, |a, b, cx| float::sub(a.unpack(cx), b.unpack(cx), cx)),
        ("mulss", mulss, |a, b, cx| float::mul(a.unpack(cx), b.unpack(cx), cx)),
        ("divss", divss, |a, b, cx| float::div(a.unpack(cx), b.unpack(cx), cx)),
        ("minss", minss, float::min),
        ("maxss", maxss, float::max),
    ];
    for (seed, (name, host, ours)) in table.into_iter().enumerate() {
        check(name, seed as u64, host, u32::MAX.into(), singles, |a, b, cx| {
            ours(F32(a as u32), F32(b as u32), cx).0.into()
        });
    }
    check("sqrtss", 6, sqrtss, u32::MAX.into(), singles, |_, b, cx| {
        float::sqrt::<F32>(F32(b as u32).unpack(cx), cx).0.into()
    });
}

#[test]
fn arithmetic_of_doubles() {
    let table: [(&str, HostFn, Arith<F64>); 6] = [
        ("addsd", addsd, |a, b, cx| float::add(a.unpack(cx), b.unpack(cx), cx)),
        ("subsd", subsd, |a, b, cx| float::sub(a.unpack(cx), b.unpack(cx), cx)),
        ("mulsd", mulsd, |a, b, cx| float::mul(a.unpack(cx), b.unpack(cx), cx)),
        ("divsd", divsd, |a, b, cx| float::div(a.unpack(cx), b.unpack(cx), cx)),
        ("minsd", minsd, float::min),
        ("maxsd", maxsd, float::max),
    ];
    for (seed, (name, host, ours)) in table.into_iter().enumerate() {
        check(name, seed as u64, host, u64::MAX, doubles, |a, b, cx| ours(F64(a), F64(b), cx).0);
    }
    check("sqrtsd", 6, sqrtsd, u64::MAX, doubles, |_, b, cx| float::sqrt::<F64>(F64(b).unpack(cx), cx).0);
}

#[test]
fn conversions_between_formats() {
    check("cvtss2sd", 1, cvtss2sd, u64::MAX, singles, |_, b, cx| {
        float::convert::<F64>(F32(b as u32).unpack(cx), true, cx).0
    });
    check("cvtsd2ss", 2, cvtsd2ss, u32::MAX.into(), doubles, |_, b, cx| {
        float::convert::<F32>(F64(b).unpack(cx), true, cx).0.into()
    });
    // Doubles around the limits of the range of singles, whose results are tiny or overflow.
    let narrow =
        |cases: &mut Cases| (0, (cases.f64() & !(0x7ff << 52)) | (1023 - 155 + cases.below(290)) << 52);
    check("cvtsd2ss", 3, cvtsd2ss, u32::MAX.into(), narrow, |_, b, cx| {
        float::convert::<F32>(F64(b).unpack(cx), true, cx).0.into()
    });
}

#[test]
fn predicates() {
    let hosts: [HostFn; 8] = [cmpss0, cmpss1, cmpss2, cmpss3, cmpss4, cmpss5, cmpss6, cmpss7];
    for (predicate, host) in (0u8..).zip(hosts) {
        check("cmpss", predicate.into(), host, u32::MAX.into(), singles, |a, b, cx| {
            let (a, b) = (F32(a as u32).unpack(cx), F32(b as u32).unpack(cx));
            if Predicate(predicate).holds(a, b, cx) { u32::MAX.into() } else { 0 }
        });
    }
}

#[test]
fn integral_rounding() {
    let modes = [Rounding::Nearest, Rounding::Down, Rounding::Up, Rounding::Zero];
    let mode = |i: usize, cx: &FloatContext| modes.get(i).copied().unwrap_or(cx.rounding);
    let hosts: [HostFn; 5] = [roundss0, roundss1, roundss2, roundss3, roundss4];
    for (i, host) in hosts.into_iter().enumerate() {
        check("roundss", i as u64, host, u32::MAX.into(), singles, |_, b, cx| {
            float::round_to_integral::<F32>(F32(b as u32).unpack(cx), mode(i, cx), false, cx).0.into()
        });
    }
    let hosts: [HostFn; 5] = [roundsd0, roundsd1, roundsd2, roundsd3, roundsd4];
    for (i, host) in hosts.into_iter().enumerate() {
        check("roundsd", i as u64, host, u64::MAX, doubles, |_, b, cx| {
            float::round_to_integral::<F64>(F64(b).unpack(cx), mode(i, cx), false, cx).0
        });
    }
}

#[test]
fn comparisons_to_flags() {
    let table: [(HostFn, bool, bool); 4] =
        [(comiss, false, false), (ucomiss, true, false), (comisd, false, true), (ucomisd, true, true)];
    for (seed, (host, quiet, double)) in table.into_iter().enumerate() {
        let mut cases = Cases(seed as u64);
        for _ in 0..CASES {
            let (a, b) = if double { doubles(&mut cases) } else { singles(&mut cases) };
            let mxcsr = random_mxcsr(&mut cases);
            let mut cx = FloatContext::from_mxcsr(mxcsr);
            let unpack = |n: u64| if double { F64(n).unpack(&cx) } else { F32(n as u32).unpack(&cx) };
            let flags = match float::compare(unpack(a), unpack(b), quiet, &mut cx) {
                None => 0x45,
                Some(cmp::Ordering::Less) => 1,
                Some(cmp::Ordering::Equal) => 0x40,
                Some(cmp::Ordering::Greater) => 0,
            };
            let host = host(a, b, 0, mxcsr);
            assert_eq!((flags, cx.raised()), (host.flags, host.raised), "{a:#x} {b:#x} quiet {quiet}");
        }
    }
}

#[test]
fn conversions_to_integers() {
    // Instruction, whether from a double, bits, whether truncating.
    let table: [(HostFn, bool, u32, bool); 8] = [
        (cvtss2si32, false, 32, false),
        (cvtss2si64, false, 64, false),
        (cvttss2si32, false, 32, true),
        (cvttss2si64, false, 64, true),
        (cvtsd2si32, true, 32, false),
        (cvtsd2si64, true, 64, false),
        (cvttsd2si32, true, 32, true),
        (cvttsd2si64, true, 64, true),
    ];
    for (seed, (host, double, bits, truncate)) in table.into_iter().enumerate() {
        let mut cases = Cases(seed as u64);
        for _ in 0..CASES {
            let b = if double { cases.f64() } else { cases.f32().into() };
            let mxcsr = random_mxcsr(&mut cases);
            let mut cx = FloatContext::from_mxcsr(mxcsr);
            let n: Operand = if double { F64(b).unpack(&cx) } else { F32(b as u32).unpack(&cx) };
            let rounding = if truncate { Rounding::Zero } else { cx.rounding };
            let value = float::to_int(n, bits, rounding, &mut cx) as u64 & u64::MAX >> (64 - bits);
            let host = host(0, b, 0, mxcsr);
            assert_eq!((value, cx.raised()), (host.rax, host.raised), "{b:#x} mxcsr {mxcsr:#x} to {bits}");
        }
    }
}

#[test]
fn conversions_from_integers() {
    let table: [(HostFn, bool, u32); 4] =
        [(cvtsi2ss32, false, 32), (cvtsi2ss64, false, 64), (cvtsi2sd32, true, 32), (cvtsi2sd64, true, 64)];
    for (seed, (host, double, bits)) in table.into_iter().enumerate() {
        let mut cases = Cases(seed as u64);
        for _ in 0..CASES {
            let n = cases.integer() << (64 - bits) >> (64 - bits);
            let mxcsr = random_mxcsr(&mut cases);
            let mut cx = FloatContext::from_mxcsr(mxcsr);
            let value = match double {
                true => float::from_int::<F64>(n, &mut cx).0,
                false => float::from_int::<F32>(n, &mut cx).0.into(),
            };
            let host = host(0, 0, n as u64, mxcsr);
            assert_eq!((value, cx.raised()), (host.xmm0, host.raised), "{n:#x} mxcsr {mxcsr:#x}");
        }
    }
}

/// The soft CPU's approximations are near the host's (whose error is at most 1.5 · 2^-12), and the same for
/// operands that are not positive normal numbers.
#[test]
fn approximations() {
    type Ours = fn(F32) -> F32;
    let table: [(HostFn, Ours); 2] =
        [(rcpss, float::approx::reciprocal), (rsqrtss, float::approx::reciprocal_sqrt)];
    for (seed, (host, ours)) in table.into_iter().enumerate() {
        let mut cases = Cases(seed as u64);
        for _ in 0..CASES {
            let x = cases.f32();
            let (value, host) = (ours(F32(x)).0, host(0, x.into(), 0, 0x1f80).xmm0 as u32);
            // 3 · 2^-12 is 3 · 2^11 units in the last place. Where results are just being flushed, one may be
            // a zero.
            let at_edge = (value << 1).min(host << 1) == 0 && (value << 1).max(host << 1) >> 24 == 1;
            assert!(at_edge || value.abs_diff(host) <= 3 << 11, "{x:#x}: {value:#x}, host {host:#x}");
            if x >> 23 & 0xff == 0 || x >> 23 & 0xff == 255 {
                assert_eq!(value, host, "{x:#x}");
            }
        }
    }
}

/// MXCSR at the last SIGFPE.
static AT_FAULT: AtomicU32 = AtomicU32::new(0);

/// Notes MXCSR and skips the instruction, which has four bytes.
extern "C" fn note_and_skip(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext_t with the interrupted registers, which it loads again afterwards.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        AT_FAULT.store((*context.uc_mcontext.fpregs).mxcsr, Ordering::Relaxed);
        (*context.uc_mcontext.fpregs).mxcsr = 0x1f80;
        context.uc_mcontext.gregs[libc::REG_RIP as usize] += 4;
    }
}

/// Unmasked exceptions: the flags are the same when #XM is delivered.
#[test]
fn unmasked_exceptions() {
    // SAFETY: the handler accesses only the interrupted context and an atomic.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = note_and_skip as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGFPE, &action, std::ptr::null_mut()), 0);
    }
    type Ours = fn(u64, u64, &mut FloatContext);
    let table: [(HostFn, bool, Ours); 7] = [
        (addss, false, |a, b, cx| _ = float::add::<F32>(single(a, cx), single(b, cx), cx)),
        (mulss, false, |a, b, cx| _ = float::mul::<F32>(single(a, cx), single(b, cx), cx)),
        (divss, false, |a, b, cx| _ = float::div::<F32>(single(a, cx), single(b, cx), cx)),
        (divsd, true, |a, b, cx| _ = float::div::<F64>(double(a, cx), double(b, cx), cx)),
        (sqrtsd, true, |_, b, cx| _ = float::sqrt::<F64>(double(b, cx), cx)),
        (cvtss2sd, false, |_, b, cx| _ = float::convert::<F64>(single(b, cx), true, cx)),
        (cvtsd2ss, true, |_, b, cx| _ = float::convert::<F32>(double(b, cx), true, cx)),
    ];
    for (i, (host, is_double, ours)) in table.into_iter().enumerate() {
        let mut cases = Cases(i as u64);
        for _ in 0..CASES / 16 {
            let (a, b) = if is_double { doubles(&mut cases) } else { singles(&mut cases) };
            let mxcsr = random_mxcsr(&mut cases) & !(cases.next() as u32 & 0x1f80);
            let mut cx = FloatContext::from_mxcsr(mxcsr);
            ours(a, b, &mut cx);
            AT_FAULT.store(0, Ordering::Relaxed);
            let completed = host(a, b, 0, mxcsr);
            let fault = AT_FAULT.load(Ordering::Relaxed);
            let raised = if fault == 0 { completed.raised } else { fault as u8 & 0x3f };
            assert_eq!(
                (cx.unmasked() != 0, cx.raised()),
                (fault != 0, raised),
                "{i}: {a:#x} {b:#x} mxcsr {mxcsr:#x}, host {completed:#x?}"
            );
        }
    }
}

fn single(n: u64, cx: &FloatContext) -> Operand {
    F32(n as u32).unpack(cx)
}

fn double(n: u64, cx: &FloatContext) -> Operand {
    F64(n).unpack(cx)
}
