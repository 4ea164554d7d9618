//! Whether the branch counter is exact in the guest whatever happens, and how late its overflows come.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::libc::SIGRTMIN;
use serde::Serialize;
use vmm::vcpu::landing::TickCounter;
use vmm::vcpu::perf::events::Event;
use vmm::vcpu::perf::{Counting, GracePeriod, PerfCounter};

use super::micro::{Left, Micro};
use super::{Care, Check};

/// Rounds of a counted loop.
const ROUNDS: u32 = 1_000_000;
/// Rounds of one that leaves each time.
const ROUNDS_LEAVING: u32 = 20_000;
/// Overflows measured.
const OVERFLOWS: u32 = 2_000;

/// How late overflows come, in branches.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Skid {
    overflows: u32,
    early: u32,
    lost: u32,
    median: u64,
    p999: u64,
    max: u64,
    /// What a lander should be given: twice the worst.
    margin: u64,
}

impl fmt::Display for Skid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Skid { overflows, early, lost, median, p999, max, margin } = self;
        write!(
            f,
            "{overflows} overflows, {early} early, {lost} lost; late by {median} (median), {p999} (p99.9), "
        )?;
        write!(f, "{max} (max) branches: margin {margin}")
    }
}

/// What each count needs.
struct Bench<'a> {
    kvm: &'a Kvm,
    counter: PerfCounter,
    event: Event,
    grace: GracePeriod,
    /// How often each storm is run.
    repeats: u32,
}

/// Names of the checks that need a counter.
const COUNTING: [&str; 5] = [
    "counting in the guest",
    "counting with exits",
    "counting with interrupts",
    "counting with signals",
    "skid",
];

/// All of them.
pub fn check(checks: &mut Vec<Check>, kvm: &Kvm, event: Option<Event>, care: Care) -> Option<Skid> {
    let opened = open(checks, event);
    let Some((counter, grace, event)) = opened else {
        let none = |name: &&'static str| Check::not_applicable(name, "there is no counter");
        checks.extend(COUNTING.iter().map(none));
        return None;
    };
    if care.is_satisfied(checks) {
        return None;
    }
    let repeats = if care == Care::Brief { 3 } else { 20 };
    let mut bench = Bench { kvm, counter, event, grace, repeats };
    let storms: [(&str, Storm); 4] = [
        (COUNTING[0], Storm::Quiet),
        (COUNTING[1], Storm::Exits),
        (COUNTING[2], Storm::Interrupts),
        (COUNTING[3], Storm::Signals),
    ];
    for (name, storm) in storms {
        checks.push(bench.counts(name, storm));
    }
    if care == Care::Brief {
        return None;
    }
    let skid = bench.skid();
    checks.push(match &skid {
        Ok(skid) => Check::passes(
            COUNTING[4],
            skid.lost == 0,
            skid.to_string(),
            "overflows get lost: replays will go back and try again often",
        ),
        Err(e) => Check::fail(COUNTING[4], e.clone(), "positions are at exits here"),
    });
    skid.ok()
}

/// Opens the counter, and says why not.
fn open(checks: &mut Vec<Check>, event: Option<Event>) -> Option<(PerfCounter, GracePeriod, Event)> {
    let paranoid = std::fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    let permission = format!("perf_event_paranoid is {}", paranoid.trim());
    // Without a known event any serves to see what the kernel says.
    let config = event.map_or(0xc4, |e| e.config);
    let signal = SIGRTMIN() + 4;
    let installed = signal_hook::flag::register(signal, Arc::<AtomicBool>::default());
    let opened = PerfCounter::open(Counting::guest(config), signal);
    let denied = opened
        .as_ref()
        .is_err_and(|e| matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EACCES | Errno::EPERM)));
    checks.push(Check::passes(
        "counter permission",
        !denied,
        match denied {
            true => permission,
            false => format!("{permission}, and this user may count in guests"),
        },
        "sysctl kernel.perf_event_paranoid=1, or give vmft CAP_PERFMON",
    ));
    match (opened, event) {
        (Ok(counter), Some(event)) => {
            checks.push(Check::pass("counter", format!("{} opens, pinned and guest-only", event.name)));
            let grace = installed.and_then(|_| GracePeriod::new(Duration::from_micros(100), signal));
            return grace.ok().map(|grace| (counter, grace, event));
        }
        (Ok(_), None) => {
            checks.push(Check::not_applicable("counter", "which event counts here is not known"))
        }
        (Err(e), _) => {
            let pmu = std::path::Path::new("/sys/bus/event_source/devices/cpu").exists()
                || std::path::Path::new("/sys/bus/event_source/devices/cpu_core").exists();
            let why = if pmu { "" } else { "; the kernel drives no performance counters (no PMU)" };
            let remedy = match e.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EOPNOTSUPP) if pmu => {
                    "stop virtual machines that have a mediated PMU, and try again"
                }
                _ => "use a host with a PMU: bare metal, or a virtual machine that is given one",
            };
            checks.push(Check::fail("counter", format!("perf_event_open: {e}{why}"), remedy));
        }
    }
    None
}

/// What goes on while the counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storm {
    Quiet,
    Exits,
    Interrupts,
    Signals,
}

impl Storm {
    /// A loop of so many rounds, one conditional branch each.
    fn program(self) -> (Vec<u8>, u32) {
        let (body, rounds): (&[u8], u32) = match self {
            // out 0x10, al; mov [0x200000], eax; cpuid would clobber ecx
            Storm::Exits => (&[0xe6, 0x10, 0x89, 0x04, 0x25, 0, 0, 0x20, 0], ROUNDS_LEAVING),
            _ => (&[0x48, 0xff, 0xc3], ROUNDS),
        };
        // mov ecx, rounds; sti; body; dec ecx; jnz; cli; hlt
        let mut code = vec![0xb9];
        code.extend(rounds.to_le_bytes());
        code.push(0xfb);
        code.extend(body);
        let back = -(body.len() as i8) - 4;
        code.extend([0xff, 0xc9, 0x75, back as u8, 0xfa, 0xf4]);
        (code, rounds)
    }
}

impl Bench<'_> {
    /// Counts a loop of known length again and again.
    fn counts(&mut self, name: &'static str, storm: Storm) -> Check {
        let (repeats, mut disturbed) = (self.repeats, 0);
        for _ in 0..repeats {
            match self.count(storm) {
                Ok((counted, expected, times)) if counted == expected => disturbed += times,
                Ok((counted, expected, _)) => {
                    let reason = format!("{counted} branches where {expected} retired");
                    let remedy = "positions are at exits here; see SpecLockMap, freeze_on_smi, bare metal";
                    return Check::fail(name, reason, remedy);
                }
                Err(e) => return Check::fail(name, e, "positions are at exits here"),
            }
        }
        Check::pass(name, format!("exact in {repeats} runs, {disturbed} times disturbed"))
    }

    /// Branches counted, branches retired, and how often the guest was disturbed.
    fn count(&mut self, storm: Storm) -> Result<(u64, u64, u32), String> {
        let said = |e: kvm_ioctls::Error| format!("KVM: {e}");
        let (program, rounds) = storm.program();
        let mut guest = Micro::new(self.kvm, &program).map_err(said)?;
        let before = self.counter.count().map_err(|e| e.to_string())?;
        let mut times = 0;
        loop {
            if matches!(storm, Storm::Signals | Storm::Interrupts) {
                self.grace.kick().map_err(|e| e.to_string())?;
            }
            match guest.run().map_err(said)? {
                Left::Halted => break,
                Left::Out(_) | Left::Memory => times += 1,
                Left::Interrupted => {
                    times += 1;
                    if storm == Storm::Interrupts {
                        guest.interrupt().map_err(said)?;
                    }
                }
                left => return Err(format!("the guest left by {left:?}")),
            }
            self.grace.take().map_err(|e| e.to_string())?;
        }
        self.grace.take().map_err(|e| e.to_string())?;
        let after = self.counter.count().map_err(|e| e.to_string())?;
        Ok((after - before, rounds.into(), times))
    }

    /// Arms the counter for many periods, and sees where the guest is when the signal has stopped it.
    fn skid(&mut self) -> Result<Skid, String> {
        let said = |e: kvm_ioctls::Error| format!("KVM: {e}");
        let counter = |e: vmm::vcpu::landing::LandingError| e.to_string();
        let (program, rounds) = Storm::Quiet.program();
        let mut late = Vec::new();
        let mut skid = Skid { overflows: OVERFLOWS, ..Skid::default() };
        for n in 0..OVERFLOWS {
            let mut guest = Micro::new(self.kvm, &program).map_err(said)?;
            // Periods from 1,000 to nearly the whole loop, none a multiple of another.
            let period = 1000 + u64::from(n) * 7919 % u64::from(rounds * 9 / 10);
            let target = self.counter.count().map_err(counter)? + period;
            self.counter.arm(period).map_err(counter)?;
            let left = guest.run().map_err(said)?;
            self.counter.disarm().map_err(counter)?;
            let now = self.counter.count().map_err(counter)?;
            match left {
                Left::Interrupted if now < target => skid.early += 1,
                Left::Interrupted => late.push(now - target),
                _ => skid.lost += 1,
            }
        }
        late.sort_unstable();
        let at = |part: f64| late.get((late.len() as f64 * part) as usize).copied().unwrap_or_default();
        (skid.median, skid.p999) = (at(0.5), at(0.999));
        skid.max = late.last().copied().unwrap_or_default();
        skid.margin = (2 * skid.max).max(self.event.skid);
        Ok(skid)
    }
}
