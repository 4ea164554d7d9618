//! The summary of a run, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use entry::PositionUnit;
use serde::Serialize;
use vmm::Machine;
use vmm::vcpu::landing::Landings;

use crate::error::Error;
use crate::outside::{DigestAt, Traffic};

/// Figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// What positions count: instructions, exits, branches or steps.
    pub unit: &'static str,
    /// How many of these units this run executed.
    pub instructions: u64,
    /// Position at the end.
    pub position: u64,
    /// Wall time, s.
    pub wall_s: f64,
    /// The part of it that was slept because the guest was idle, s.
    pub slept_s: f64,
    /// Guest time at the end, s.
    pub guest_s: f64,
    /// Guest time that was skipped because the guest was idle, s.
    pub idle_s: f64,
    /// Millions of units a second while the guest was not idle.
    pub mips: f64,
    /// Port accesses.
    pub pio: u64,
    /// Accesses to memory-mapped devices.
    pub mmio: u64,
    /// HLT exits.
    pub halts: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// How often another thread stopped the guest.
    pub kicks: u64,
    /// Landings by the branch counter.
    pub landings: Landings,
    /// Addresses of the kernel's instructions that were rewritten as exits, by instruction.
    pub rewritten: BTreeMap<&'static str, Vec<String>>,
    /// Frames sent to the network.
    pub frames_sent: u64,
    /// Frames that the tap did not accept.
    pub frames_dropped: u64,
    /// How often an input waited too long for an exit of the guest.
    pub starved: u64,
    /// The longest such wait, s.
    pub starved_longest_s: f64,
    /// The digests that --digest-at asked for.
    pub digests: Vec<DigestAt>,
}

impl Summary {
    /// The summary of a machine that started at position `from` and ran for `wall`.
    pub fn new(machine: &Machine, from: u64, wall: Duration, traffic: Traffic) -> Summary {
        let counts = machine.counts();
        let position = machine.position().count;
        let instructions = position - from;
        let busy = wall.saturating_sub(traffic.slept).as_secs_f64();
        Summary {
            unit: unit_name(machine.unit()),
            instructions,
            position,
            wall_s: wall.as_secs_f64(),
            slept_s: traffic.slept.as_secs_f64(),
            guest_s: machine.time_ns() as f64 / 1e9,
            idle_s: counts.idle_ns as f64 / 1e9,
            mips: instructions as f64 / 1e6 / busy.max(1e-9),
            pio: counts.pio,
            mmio: counts.mmio,
            halts: counts.halts,
            interrupts: counts.interrupts,
            kicks: counts.kicks,
            landings: counts.landings,
            rewritten: rewritten(machine),
            frames_sent: traffic.frames_sent,
            frames_dropped: traffic.frames_dropped,
            starved: traffic.starved.times,
            starved_longest_s: traffic.starved.longest.as_secs_f64(),
            digests: Vec::new(),
        }
    }
}

impl Summary {
    /// Writes the summary as JSON.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let failed = || Error::host(format!("cannot write summary {}", path.display()));
        let file = File::create(path).map_err(failed())?;
        serde_json::to_writer_pretty(file, self).map_err(std::io::Error::from).map_err(failed())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} {} in {:.3} s ({:.3} s of it asleep): {:.3} million/s; guest time {:.3} s, {:.3} s of it idle",
            self.instructions, self.unit, self.wall_s, self.slept_s, self.mips, self.guest_s, self.idle_s
        )?;
        writeln!(
            f,
            "exits: {} port, {} memory, {} halt, {} kick; {} interrupts; {} frames sent",
            self.pio, self.mmio, self.halts, self.kicks, self.interrupts, self.frames_sent
        )?;
        let Landings { anchored, starved, landed, retries, .. } = self.landings;
        if self.landings != Landings::default() {
            writeln!(
                f,
                "branch counter: {anchored} kicks stopped at a branch, {starved} did not; {landed} positions landed on, \
                 {retries} missed and tried again with twice the margin"
            )?;
        }
        if self.starved > 0 {
            writeln!(
                f,
                "{} times an input waited for the guest's next exit, for up to {:.1} s: the guest runs for long without an exit",
                self.starved, self.starved_longest_s
            )?;
        }
        if self.frames_dropped > 0 {
            writeln!(f, "{} frames were dropped because the tap did not accept them", self.frames_dropped)?;
        }
        Ok(())
    }
}

fn rewritten(machine: &Machine) -> BTreeMap<&'static str, Vec<String>> {
    let mut all = BTreeMap::<_, Vec<_>>::new();
    for (at, site) in machine.rewritten().iter().flat_map(|r| r.sites.iter()) {
        all.entry(site.insn.name()).or_default().push(format!("{at:#x}"));
    }
    all
}

fn unit_name(unit: PositionUnit) -> &'static str {
    match unit {
        PositionUnit::Instructions => "instructions",
        PositionUnit::SynchronousExits => "exits",
        PositionUnit::Branches => "branches",
        PositionUnit::Steps => "steps",
    }
}
