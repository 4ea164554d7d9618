//! What KVM does at exits, breakpoints and steps, and what a guest can read that differs between hosts.

use kvm_ioctls::Kvm;
use twox_hash::XxHash3_128;

use super::Check;
use super::micro::{CODE, Left, Micro};

const RF: u64 = 1 << 16;
/// mov ecx, 3; l: dec ecx; jnz l; hlt
const LOOP: [u8; 10] = [0xb9, 3, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xf4];
/// Where its JNZ is.
const JNZ: u64 = CODE + 7;

type Try<T> = Result<T, kvm_ioctls::Error>;

/// All of them.
pub fn check(checks: &mut Vec<Check>, kvm: &Kvm) {
    let failed = |name| move |e: kvm_ioctls::Error| Check::fail(name, format!("KVM: {e}"), "another kernel");
    checks.push(exits(kvm).unwrap_or_else(failed("exits")));
    checks.push(breakpoint(kvm).unwrap_or_else(failed("breakpoint")));
    checks.push(step(kvm).unwrap_or_else(failed("single step")));
    checks.push(leaks(kvm).unwrap_or_else(failed("instructions")));
    checks.push(replay(kvm).unwrap_or_else(failed("replay by exits")));
}

/// An exit is completed without going on, and registers can be set there.
fn exits(kvm: &Kvm) -> Try<Check> {
    // out 0x10, al; mov bl, al; hlt
    let mut guest = Micro::new(kvm, &[0xe6, 0x10, 0x88, 0xc3, 0xf4])?;
    let first = guest.run()?;
    let finished = guest.finish()?;
    let mut regs = guest.regs()?;
    let whole = regs.rip == CODE + 2;
    regs.rax = 0x5a;
    guest.set_regs(&regs)?;
    let last = guest.run()?;
    let kept = guest.regs()?.rbx & 0xff == 0x5a;
    let good = (first, finished, last) == (Left::Out(0x10), Left::Interrupted, Left::Halted) && whole && kept;
    Ok(Check::passes(
        "exits",
        good,
        match good {
            true => "an access is completed at a whole boundary, registers set there last".into(),
            false => format!("{first:?}, {finished:?}, {last:?}; whole {whole}, registers kept {kept}"),
        },
        "another kernel: completing an access by immediate_exit does not work here",
    ))
}

/// A breakpoint stops the guest before the instruction each time, and RF passes it.
fn breakpoint(kvm: &Kvm) -> Try<Check> {
    const NAME: &str = "breakpoint";
    let mut guest = Micro::new(kvm, &LOOP)?;
    guest.break_at(Some(JNZ))?;
    let mut left = Vec::new();
    for _ in 0..3 {
        if guest.run()? != Left::Debug || guest.regs()?.rip != JNZ {
            let remedy = "another kernel or CPU: landing needs breakpoints";
            return Ok(Check::fail(NAME, "it does not stop the guest before the instruction", remedy));
        }
        let mut regs = guest.regs()?;
        left.push(regs.rcx);
        regs.rflags |= RF;
        guest.set_regs(&regs)?;
    }
    if left != [2, 1, 0] {
        let reason = "it stops the guest, and RF has no effect: each hit is passed by a single step";
        return Ok(Check::pass(NAME, reason));
    }
    let last = guest.run()?;
    let clean = guest.regs()?.rflags & RF == 0;
    let reason = format!("hit once a round, passed by RF (ends in {last:?}, RF clear: {clean})");
    Ok(Check::passes(NAME, last == Left::Halted && clean, reason, "another kernel or CPU"))
}

/// Stepping stops behind each instruction. The HLT at the end is left out: its stop may be squashed.
fn step(kvm: &Kvm) -> Try<Check> {
    const INSTRUCTIONS: u32 = 7;
    let mut guest = Micro::new(kvm, &LOOP)?;
    guest.step()?;
    let mut steps = 0;
    while guest.regs()?.rip != JNZ + 2 && steps <= INSTRUCTIONS && guest.run()? == Left::Debug {
        steps += 1;
    }
    let good = steps == INSTRUCTIONS && guest.regs()?.rcx == 0;
    let reason = format!("{steps} stops over {INSTRUCTIONS} instructions");
    Ok(Check::passes("single step", good, reason, "positions by steps are for tests only"))
}

/// Instructions whose result is the host's, by name and code. Each is run twice, the result is EAX and EDX.
const TELLING: [(&str, &[u8]); 7] = [
    ("RDTSC", &[0x0f, 0x31]),
    ("RDTSCP", &[0x0f, 0x01, 0xf9]),
    ("RDRAND", &[0x0f, 0xc7, 0xf0]),
    ("RDSEED", &[0x0f, 0xc7, 0xf8]),
    ("RDPID", &[0xf3, 0x0f, 0xc7, 0xf8]),
    ("RDPMC", &[0x0f, 0x33]),
    ("CPUID.1", &[0xb8, 1, 0, 0, 0, 0x0f, 0xa2]),
];
/// Hidden by the table in CPUID.1:ECX: RDRAND.
const CPUID_RDRAND: u64 = 1 << 30;

/// Which instructions tell a guest something of the host though CPUID hides them.
fn leaks(kvm: &Kvm) -> Try<Check> {
    let mut leaking = Vec::new();
    for (name, code) in TELLING {
        let mut guest = Micro::new(kvm, &[code, &[0xf4]].concat())?;
        // An exception, an exit, or that KVM cannot execute it is no leak.
        let executed = guest.run()? == Left::Halted;
        let cpuid = name.starts_with("CPUID");
        if executed && (!cpuid || guest.regs()?.rcx & CPUID_RDRAND != 0) {
            leaking.push(name);
        }
    }
    Ok(Check::passes(
        "instructions",
        leaking.is_empty(),
        match leaking.is_empty() {
            true => "what CPUID hides cannot be executed".into(),
            false => format!("executed although hidden: {}", leaking.join(", ")),
        },
        "vmft rewrites a Linux kernel's own uses; programs in the guest must not use them",
    ))
}

/// A program that mixes answers from a port into memory: `rounds` times IN, some arithmetic, a store, OUT.
fn mixing() -> Vec<u8> {
    let mut code = vec![0xb9, 64, 0, 0, 0]; // mov ecx, 64
    let body = [
        &[0xe4, 0x11][..],                     // in al, 0x11
        &[0x48, 0x01, 0xc3],                   // add rbx, rax
        &[0x48, 0x6b, 0xdb, 0x1f],             // imul rbx, rbx, 31
        &[0x48, 0xc1, 0xc3, 0x07],             // rol rbx, 7
        &[0x48, 0x89, 0x1c, 0xcd, 0, 0, 4, 0], // mov [DATA + rcx * 8], rbx
        &[0x88, 0xd8, 0xe6, 0x10],             // mov al, bl; out 0x10, al
        &[0xff, 0xc9],                         // dec ecx
    ]
    .concat();
    let back = -(body.len() as i8) - 2;
    code.extend(body);
    code.extend([0x75, back as u8, 0xf4]); // jnz; hlt
    code
}

/// Runs [`mixing`] with these answers; gives a digest of memory and registers at the end.
fn mixed(kvm: &Kvm, mut answer: impl FnMut(u32) -> u8) -> Try<Option<u128>> {
    let mut guest = Micro::new(kvm, &mixing())?;
    let mut asked = 0;
    loop {
        match guest.run()? {
            Left::In(0x11) => {
                guest.answer(answer(asked));
                asked += 1;
                guest.finish()?;
            }
            Left::Out(0x10) => {
                guest.finish()?;
            }
            Left::Halted => break,
            _ => return Ok(None),
        }
    }
    let regs = guest.regs()?;
    let mut state = guest.memory().to_vec();
    for value in [regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsp, regs.rip, regs.rflags] {
        state.extend(value.to_le_bytes());
    }
    Ok(Some(XxHash3_128::oneshot(&state)))
}

/// Records random answers at exits, and replays them.
fn replay(kvm: &Kvm) -> Try<Check> {
    const NAME: &str = "replay by exits";
    const RUNS: u32 = 5;
    let mut noise = std::fs::File::open("/dev/urandom").ok();
    let mut recorded = Vec::new();
    let first = mixed(kvm, |_| {
        let mut byte = [0];
        if let Some(file) = &mut noise {
            // Without chance the answers are all zero, which serves as well.
            std::io::Read::read_exact(file, &mut byte).unwrap_or_default();
        }
        recorded.push(byte[0]);
        byte[0]
    })?;
    for _ in 0..RUNS {
        let again = mixed(kvm, |n| recorded[n as usize % recorded.len()])?;
        if again != first || first.is_none() {
            let reason = "the same answers at the same exits gave another state";
            return Ok(Check::fail(NAME, reason, "use the soft engine, and report this host"));
        }
    }
    let other = mixed(kvm, |n| recorded[n as usize % recorded.len()] ^ u8::from(n == 31))?;
    let good = other != first;
    let reason = format!(
        "{} random answers, {RUNS} replays with equal digests, a changed one differs: {good}",
        recorded.len()
    );
    Ok(Check::passes(NAME, good, reason, "report this host"))
}
