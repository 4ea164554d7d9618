//! Compares the two outcomes of a case.

use crate::flow::Flow;
use crate::layout::word_address;
use crate::state::{CaseEnd, CaseOutcome, CaseStart};
use crate::vendor::Vendor;

/// The result of comparing the outcomes of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Both CPUs did the same.
    Same,
    /// It cannot be compared, for this reason.
    Skipped(&'static str),
    /// They differ; there is a line for each difference.
    Different(Vec<String>),
}

/// RFLAGS.RF, which faults push set or clear for the sake of debuggers (SDM 3B 18.3.1.1): not a result of the
/// case.
const RF: u64 = 1 << 16;
const PAGE_FAULT: u8 = 14;
const BREAKPOINT: u8 = 3;
const UNDEFINED: u8 = 6;
/// Linux reports page faults at and above this address as protection faults, so that programs cannot learn
/// what it has mapped.
const KERNEL_START: u64 = 0x7fff_ffff_f000;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Compares the outcomes of a case on the host, a processor of `vendor`, and on the soft CPU.
pub fn compare(
    vendor: Vendor,
    start: &CaseStart,
    flow: &Flow,
    native: &CaseOutcome,
    soft: &CaseOutcome,
) -> Comparison {
    match &native.end {
        CaseEnd::SystemCall => return Comparison::Skipped("it made a system call"),
        CaseEnd::Never => return Comparison::Skipped("it did not end"),
        _ => {}
    }
    let mut lines = Vec::new();
    if comparable(&native.end) != comparable(&soft.end) {
        lines.push(format!("end: native {:x?}, soft {:x?}", native.end, soft.end));
    }
    let mut differ = |name: &str, was: u128, native: u128, soft: u128| {
        if native != soft {
            lines.push(format!("{name}: native {native:#x}, soft {soft:#x}, was {was:#x}"));
        }
    };
    differ("rip", start.rip as u128, native.rip as u128, soft.rip as u128);
    for (i, name) in NAMES.iter().enumerate() {
        differ(name, start.gpr[i] as u128, native.gpr[i] as u128, soft.gpr[i] as u128);
    }
    let trap = matches!(native.end, CaseEnd::Exception { vector: BREAKPOINT, .. });
    let ignore = RF | flow.undefined_at(native.rip, trap);
    differ(
        "rflags (defined)",
        start.rflags as u128,
        (native.rflags & !ignore) as u128,
        (soft.rflags & !ignore) as u128,
    );
    let (was, n, s) = (&start.fx, &native.fx, &soft.fx);
    differ("fcw", was.fcw as u128, n.fcw as u128, s.fcw as u128);
    differ("fsw", was.fsw as u128, n.fsw as u128, s.fsw as u128);
    differ("ftw (abridged)", was.in_use as u128, n.in_use as u128, s.in_use as u128);
    differ("mxcsr", was.mxcsr as u128, n.mxcsr as u128, s.mxcsr as u128);
    let wide = |(significand, sign_exponent): (u64, u16)| significand as u128 | (sign_exponent as u128) << 64;
    for i in 0..8 {
        differ(&format!("st{i}"), wide(was.st[i]), wide(n.st[i]), wide(s.st[i]));
    }
    for i in 0..16 {
        differ(&format!("xmm{i}"), was.xmm[i], n.xmm[i], s.xmm[i]);
    }
    memory(native, soft, |n, s| vendor.same_word(flow, n, s), &mut lines);
    match &soft.end {
        _ if lines.is_empty() => Comparison::Same,
        CaseEnd::Exception { vector: UNDEFINED, .. } if flow.strayed(start, soft.rip) => {
            Comparison::Skipped("a computed jump led to an instruction that the soft CPU does not have")
        }
        _ => Comparison::Different(lines),
    }
}

/// How a case ended, without the details that are not compared.
fn comparable(end: &CaseEnd) -> CaseEnd {
    match end {
        CaseEnd::Exception { vector: PAGE_FAULT, error, cr2 } if *cr2 >= KERNEL_START => {
            CaseEnd::Exception { vector: PAGE_FAULT, error: error | 1, cr2: *cr2 }
        }
        CaseEnd::Exception { vector, error, .. } if *vector != PAGE_FAULT => {
            CaseEnd::Exception { vector: *vector, error: *error, cr2: 0 }
        }
        end => end.clone(),
    }
}

fn memory(
    native: &CaseOutcome,
    soft: &CaseOutcome,
    same: impl Fn(u64, u64) -> bool,
    lines: &mut Vec<String>,
) {
    let get =
        |o: &CaseOutcome, i: u32| o.memory.binary_search_by_key(&i, |w| w.0).map(|n| o.memory[n].1).ok();
    let mut words: Vec<u32> = native.memory.iter().chain(&soft.memory).map(|w| w.0).collect();
    words.sort_unstable();
    words.dedup();
    let show = |v: Option<u64>| v.map_or("unchanged".to_string(), |v| format!("{v:#018x}"));
    for i in words {
        let (n, s) = (get(native, i), get(soft, i));
        if n != s && !n.zip(s).is_some_and(|(n, s)| same(n, s)) {
            let at = word_address(i as usize);
            lines.push(format!("memory {at:#x}: native {}, soft {}", show(n), show(s)));
        }
    }
}
