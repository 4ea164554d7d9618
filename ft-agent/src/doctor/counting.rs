//! Whether the branch counter is exact while a guest runs, whatever interrupts the guest, and how late its overflows come.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::libc::SIGRTMIN;
use serde::Serialize;
use vmm::vcpu::landing::TickCounter;
use vmm::vcpu::perf::events::BranchEvent;
use vmm::vcpu::perf::{CounterConfig, GracePeriod, PerfCounter};

use super::micro::{MicroExit, MicroGuest};
use super::{Check, EXITS_ONLY, Thoroughness};

/// Rounds of the loop whose branches are counted.
const ROUNDS: u32 = 1_000_000;
/// Rounds of the loop when it makes exits in each round.
const ROUNDS_WITH_EXITS: u32 = 20_000;
/// How many overflows are measured.
const OVERFLOWS: u32 = 2_000;

/// How late the counter's overflows come, in branches.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MeasuredSkid {
    overflows: u32,
    early: u32,
    lost: u32,
    median: u64,
    p999: u64,
    max: u64,
    /// The margin that a lander should be given: twice the worst.
    margin: u64,
}

impl fmt::Display for MeasuredSkid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MeasuredSkid { overflows, early, lost, median, p999, max, margin } = self;
        write!(
            f,
            "{overflows} overflows, {early} early, {lost} lost; late by {median} (median), {p999} (99.9th percentile), "
        )?;
        write!(f, "{max} (maximum) branches; the margin should be {margin}")
    }
}

/// What each of the tests needs.
struct CounterTest<'a> {
    kvm: &'a Kvm,
    counter: PerfCounter,
    event: BranchEvent,
    grace: GracePeriod,
    /// How often the loop is run under each kind of interference.
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

/// Runs all of these checks. With [`Thoroughness::Thorough`] also measures the skid.
pub fn check(
    checks: &mut Vec<Check>,
    kvm: &Kvm,
    event: Option<BranchEvent>,
    thoroughness: Thoroughness,
) -> Option<MeasuredSkid> {
    let opened = open_counter(checks, event);
    let Some((counter, grace, event)) = opened else {
        let none =
            |name: &&'static str| Check::not_applicable(name, "not tested: there is no branch counter");
        checks.extend(COUNTING.iter().map(none));
        return None;
    };
    if thoroughness.can_stop(checks) {
        return None;
    }
    let repeats = if thoroughness == Thoroughness::Brief { 3 } else { 20 };
    let mut test = CounterTest { kvm, counter, event, grace, repeats };
    let kinds: [(&str, Interference); 4] = [
        (COUNTING[0], Interference::Quiet),
        (COUNTING[1], Interference::Exits),
        (COUNTING[2], Interference::Interrupts),
        (COUNTING[3], Interference::Signals),
    ];
    for (name, interference) in kinds {
        checks.push(test.check_counting(name, interference));
    }
    if thoroughness == Thoroughness::Brief {
        return None;
    }
    let skid = test.skid();
    checks.push(match &skid {
        Ok(skid) => Check::passes(
            COUNTING[4],
            skid.lost == 0,
            skid.to_string(),
            "replays stay exact, but will often have to go back and try again",
        ),
        Err(e) => Check::fail(
            COUNTING[4],
            e.clone(),
            "replays will start with a guessed margin, and may often have to go back and try again",
        ),
    });
    skid.ok()
}

/// Opens the counter, and the timer that interrupts the guest; adds the checks that say why it could not be opened.
fn open_counter(
    checks: &mut Vec<Check>,
    event: Option<BranchEvent>,
) -> Option<(PerfCounter, GracePeriod, BranchEvent)> {
    let paranoid = std::fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    let paranoid = paranoid.trim();
    // If the event is not known, any other shows as well whether this user may count.
    let config = event.map_or(0xc4, |e| e.config);
    let signal = SIGRTMIN() + 4;
    let installed = signal_hook::flag::register(signal, Arc::<AtomicBool>::default());
    let opened = PerfCounter::open(CounterConfig::guest(config), signal);
    let denied = opened
        .as_ref()
        .is_err_and(|e| matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EACCES | Errno::EPERM)));
    checks.push(Check::passes(
        "counter permission",
        !denied,
        match denied {
            true => format!("this user may not count branches in guests: perf_event_paranoid is {paranoid}"),
            false => format!("this user may count branches in guests (perf_event_paranoid is {paranoid})"),
        },
        "run as root: sysctl kernel.perf_event_paranoid=1; or give vmft CAP_PERFMON",
    ));
    match (opened, event) {
        (Ok(counter), Some(event)) => {
            checks.push(Check::pass(
                "counter",
                format!("{} can be opened, pinned and counting in guests only", event.name),
            ));
            let grace = installed.and_then(|_| GracePeriod::new(Duration::from_micros(100), signal));
            return grace.ok().map(|grace| (counter, grace, event));
        }
        (Ok(_), None) => checks.push(Check::not_applicable(
            "counter",
            "not tested: it is not known which event counts conditional branches on this CPU",
        )),
        (Err(e), _) => {
            let pmu = std::path::Path::new("/sys/bus/event_source/devices/cpu").exists()
                || std::path::Path::new("/sys/bus/event_source/devices/cpu_core").exists();
            let why = if pmu {
                ""
            } else {
                "; the kernel has no driver for this CPU's performance counters (no PMU)"
            };
            let remedy = match e.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EOPNOTSUPP) if pmu => {
                    "stop the virtual machines that use a mediated PMU, and try again"
                }
                _ => "use a host with a PMU: bare metal, or a virtual machine that is given one",
            };
            checks.push(Check::fail(
                "counter",
                format!("the branch counter cannot be opened: perf_event_open: {e}{why}"),
                remedy,
            ));
        }
    }
    None
}

/// What interrupts the guest while the counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interference {
    /// Nothing.
    Quiet,
    /// Exits of its own.
    Exits,
    /// Interrupts that are injected.
    Interrupts,
    /// Signals to the thread that runs it.
    Signals,
}

impl Interference {
    /// A loop with one conditional branch in each round, and how many rounds it has.
    fn program(self) -> (Vec<u8>, u32) {
        let (body, rounds): (&[u8], u32) = match self {
            // out 0x10, al; mov [0x200000], eax; cpuid would clobber ecx
            Interference::Exits => (&[0xe6, 0x10, 0x89, 0x04, 0x25, 0, 0, 0x20, 0], ROUNDS_WITH_EXITS),
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

impl CounterTest<'_> {
    /// Checks that a loop of known length is counted exactly, again and again.
    fn check_counting(&mut self, name: &'static str, interference: Interference) -> Check {
        let (repeats, mut stopped) = (self.repeats, 0);
        for _ in 0..repeats {
            match self.count_loop(interference) {
                Ok((counted, expected, times)) if counted == expected => stopped += times,
                Ok((counted, expected, _)) => {
                    let reason =
                        format!("the counter counted {counted} branches where the guest retired {expected}");
                    let remedy = format!(
                        "{EXITS_ONLY}; see SpecLockMap, freeze_on_smi and bare metal for possible causes"
                    );
                    return Check::fail(name, reason, remedy);
                }
                Err(e) => return Check::fail(name, e, EXITS_ONLY),
            }
        }
        Check::pass(
            name,
            format!("exact in {repeats} runs of a loop of known length, stopped {stopped} times on the way"),
        )
    }

    /// Runs the loop once: branches counted, branches retired, and how often the guest was stopped.
    fn count_loop(&mut self, interference: Interference) -> Result<(u64, u64, u32), String> {
        let kvm_failed = |e: kvm_ioctls::Error| format!("a call of KVM failed: {e}");
        let (program, rounds) = interference.program();
        let mut guest = MicroGuest::new(self.kvm, &program).map_err(kvm_failed)?;
        let before = self.counter.count().map_err(|e| e.to_string())?;
        let mut times = 0;
        loop {
            if matches!(interference, Interference::Signals | Interference::Interrupts) {
                self.grace.kick().map_err(|e| e.to_string())?;
            }
            match guest.run().map_err(kvm_failed)? {
                MicroExit::Halted => break,
                MicroExit::Out(_) | MicroExit::Memory => times += 1,
                MicroExit::Interrupted => {
                    times += 1;
                    if interference == Interference::Interrupts {
                        guest.inject_if_ready().map_err(kvm_failed)?;
                    }
                }
                exit => return Err(format!("the test guest made an unexpected exit: {exit:?}")),
            }
            self.grace.take_kick().map_err(|e| e.to_string())?;
        }
        self.grace.take_kick().map_err(|e| e.to_string())?;
        let after = self.counter.count().map_err(|e| e.to_string())?;
        Ok((after - before, rounds.into(), times))
    }

    /// Arms the counter for many different periods, and measures where the guest is when the signal has stopped it.
    fn skid(&mut self) -> Result<MeasuredSkid, String> {
        let kvm_failed = |e: kvm_ioctls::Error| format!("a call of KVM failed: {e}");
        let counter_failed = |e: vmm::vcpu::landing::LandingError| e.to_string();
        let (program, rounds) = Interference::Quiet.program();
        let mut late = Vec::new();
        let mut skid = MeasuredSkid { overflows: OVERFLOWS, ..MeasuredSkid::default() };
        for n in 0..OVERFLOWS {
            let mut guest = MicroGuest::new(self.kvm, &program).map_err(kvm_failed)?;
            // Periods from 1,000 to nearly the whole loop, none a multiple of another.
            let period = 1000 + u64::from(n) * 7919 % u64::from(rounds * 9 / 10);
            let target = self.counter.count().map_err(counter_failed)? + period;
            self.counter.arm(period).map_err(counter_failed)?;
            let exit = guest.run().map_err(kvm_failed)?;
            self.counter.disarm().map_err(counter_failed)?;
            let now = self.counter.count().map_err(counter_failed)?;
            match exit {
                MicroExit::Interrupted if now < target => skid.early += 1,
                MicroExit::Interrupted => late.push(now - target),
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
