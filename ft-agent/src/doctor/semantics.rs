//! How KVM behaves at exits, breakpoints and single steps, and which instructions show a guest something of its host.

use kvm_ioctls::Kvm;
use twox_hash::XxHash3_128;

use super::Check;
use super::micro::{CODE, MicroExit, MicroGuest};

const RF: u64 = 1 << 16;
/// mov ecx, 3; l: dec ecx; jnz l; hlt
const LOOP: [u8; 10] = [0xb9, 3, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xf4];
/// Where its JNZ is.
const JNZ: u64 = CODE + 7;

type KvmResult<T> = Result<T, kvm_ioctls::Error>;

/// Runs all of these checks.
pub fn check(checks: &mut Vec<Check>, kvm: &Kvm) {
    let failed = |name| {
        move |e: kvm_ioctls::Error| {
            Check::fail(name, format!("a call of KVM failed: {e}"), "try another kernel")
        }
    };
    checks.push(exits(kvm).unwrap_or_else(failed("exits")));
    checks.push(breakpoint(kvm).unwrap_or_else(failed("breakpoint")));
    checks.push(step(kvm).unwrap_or_else(failed("single step")));
    checks.push(hidden_instructions(kvm).unwrap_or_else(failed("instructions")));
    checks.push(replay(kvm).unwrap_or_else(failed("replay by exits")));
}

/// Checks that an exit can be completed without running the guest on, and that registers can be set there.
fn exits(kvm: &Kvm) -> KvmResult<Check> {
    // out 0x10, al; mov bl, al; hlt
    let mut guest = MicroGuest::new(kvm, &[0xe6, 0x10, 0x88, 0xc3, 0xf4])?;
    let first = guest.run()?;
    let finished = guest.finish()?;
    let mut regs = guest.regs()?;
    let at_boundary = regs.rip == CODE + 2;
    regs.rax = 0x5a;
    guest.set_regs(&regs)?;
    let last = guest.run()?;
    let kept = guest.regs()?.rbx & 0xff == 0x5a;
    let good = (first, finished, last) == (MicroExit::Out(0x10), MicroExit::Interrupted, MicroExit::Halted)
        && at_boundary
        && kept;
    Ok(Check::passes(
        "exits",
        good,
        match good {
            true => "KVM completes an access at an instruction boundary, and registers that are set there take effect".into(),
            false => format!(
                "KVM does not complete an access at an instruction boundary: exits {first:?}, {finished:?}, {last:?}; \
                 at the boundary: {at_boundary}; registers kept: {kept}"
            ),
        },
        "try another kernel: guests cannot run on KVM without this (immediate_exit)",
    ))
}

/// Checks that a breakpoint stops the guest before the instruction each time, and that RFLAGS.RF passes it.
fn breakpoint(kvm: &Kvm) -> KvmResult<Check> {
    const NAME: &str = "breakpoint";
    let mut guest = MicroGuest::new(kvm, &LOOP)?;
    guest.break_at(Some(JNZ))?;
    let mut left = Vec::new();
    for _ in 0..3 {
        if guest.run()? != MicroExit::Debug || guest.regs()?.rip != JNZ {
            let reason = "a hardware breakpoint does not stop the guest before the instruction";
            let remedy = "try another kernel or CPU: a replay needs breakpoints to stop at an exact branch";
            return Ok(Check::fail(NAME, reason, remedy));
        }
        let mut regs = guest.regs()?;
        left.push(regs.rcx);
        regs.rflags |= RF;
        guest.set_regs(&regs)?;
    }
    if left != [2, 1, 0] {
        let reason = "a breakpoint stops the guest, but RFLAGS.RF has no effect: each hit will be passed by a single step";
        return Ok(Check::pass(NAME, reason));
    }
    let last = guest.run()?;
    let clean = guest.regs()?.rflags & RF == 0;
    let good = last == MicroExit::Halted && clean;
    let reason = match good {
        true => {
            "a breakpoint stops the guest before the instruction each time, and RFLAGS.RF passes it".into()
        }
        false => {
            format!("RFLAGS.RF does not pass a breakpoint cleanly: last exit {last:?}; RF clear: {clean}")
        }
    };
    Ok(Check::passes(NAME, good, reason, "try another kernel or CPU"))
}

/// Checks that single-stepping stops after each instruction. The HLT at the end is left out: KVM may swallow its stop.
fn step(kvm: &Kvm) -> KvmResult<Check> {
    const INSTRUCTIONS: u32 = 7;
    let mut guest = MicroGuest::new(kvm, &LOOP)?;
    guest.single_step()?;
    let mut steps = 0;
    while guest.regs()?.rip != JNZ + 2 && steps <= INSTRUCTIONS && guest.run()? == MicroExit::Debug {
        steps += 1;
    }
    let good = steps == INSTRUCTIONS && guest.regs()?.rcx == 0;
    let reason = format!("single-stepping stopped {steps} times over {INSTRUCTIONS} instructions");
    let remedy = "do not use --positions step; only tests need it";
    Ok(Check::passes("single step", good, reason, remedy))
}

/// Instructions whose results depend on the host, by name and code.
const HOST_DEPENDENT: [(&str, &[u8]); 7] = [
    ("RDTSC", &[0x0f, 0x31]),
    ("RDTSCP", &[0x0f, 0x01, 0xf9]),
    ("RDRAND", &[0x0f, 0xc7, 0xf0]),
    ("RDSEED", &[0x0f, 0xc7, 0xf8]),
    ("RDPID", &[0xf3, 0x0f, 0xc7, 0xf8]),
    ("RDPMC", &[0x0f, 0x33]),
    ("CPUID.1 (shows RDRAND)", &[0xb8, 1, 0, 0, 0, 0x0f, 0xa2]),
];
/// The bit of CPUID.1:ECX for RDRAND, which the guest's table hides.
const CPUID_RDRAND: u64 = 1 << 30;

/// Checks which instructions a guest can execute although CPUID hides them.
fn hidden_instructions(kvm: &Kvm) -> KvmResult<Check> {
    let mut leaking = Vec::new();
    for (name, code) in HOST_DEPENDENT {
        let mut guest = MicroGuest::new(kvm, &[code, &[0xf4]].concat())?;
        // An exception, an exit, or a failure of KVM to execute the instruction is not a leak.
        let executed = guest.run()? == MicroExit::Halted;
        let cpuid = name.starts_with("CPUID");
        if executed && (!cpuid || guest.regs()?.rcx & CPUID_RDRAND != 0) {
            leaking.push(name);
        }
    }
    Ok(Check::passes(
        "instructions",
        leaking.is_empty(),
        match leaking.is_empty() {
            true => "a guest cannot execute the instructions that CPUID hides".into(),
            false => format!("a guest can execute instructions that CPUID hides: {}", leaking.join(", ")),
        },
        "vmft rewrites a Linux kernel's own uses; replays may differ if other programs in the guest use them",
    ))
}

/// A program that mixes answers from a port into memory: 64 times IN, some arithmetic, a store, OUT.
fn mixing_program() -> Vec<u8> {
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

/// Runs [`mixing_program`] with these answers. Returns a digest of memory and registers at its end, `None` after an unexpected exit.
fn run_mixing_program(kvm: &Kvm, mut answer: impl FnMut(u32) -> u8) -> KvmResult<Option<u128>> {
    let mut guest = MicroGuest::new(kvm, &mixing_program())?;
    let mut asked = 0;
    loop {
        match guest.run()? {
            MicroExit::In(0x11) => {
                guest.answer(answer(asked));
                asked += 1;
                guest.finish()?;
            }
            MicroExit::Out(0x10) => {
                guest.finish()?;
            }
            MicroExit::Halted => break,
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

/// Checks that replays of random answers at exits end in the recorded state.
fn replay(kvm: &Kvm) -> KvmResult<Check> {
    const NAME: &str = "replay by exits";
    const RUNS: u32 = 5;
    let mut noise = std::fs::File::open("/dev/urandom").ok();
    let mut recorded = Vec::new();
    let first = run_mixing_program(kvm, |_| {
        let mut byte = [0];
        if let Some(file) = &mut noise {
            // Without random numbers the answers are all zero, which will do.
            std::io::Read::read_exact(file, &mut byte).unwrap_or_default();
        }
        recorded.push(byte[0]);
        byte[0]
    })?;
    for _ in 0..RUNS {
        let again = run_mixing_program(kvm, |n| recorded[n as usize % recorded.len()])?;
        if again != first || first.is_none() {
            let reason = "replays with the same answers at the same exits ended in different states";
            return Ok(Check::fail(NAME, reason, "use the software CPU (--cpu soft), and report this host"));
        }
    }
    let other = run_mixing_program(kvm, |n| recorded[n as usize % recorded.len()] ^ u8::from(n == 31))?;
    let good = other != first;
    let changed =
        if good { "and one with a changed answer did not" } else { "but so did one with a changed answer" };
    let reason =
        format!("{RUNS} replays of {} random answers ended in the recorded state, {changed}", recorded.len());
    Ok(Check::passes(NAME, good, reason, "report this host: the test would not notice a wrong replay"))
}
