//! Exact positions by a counter of retired conditional branches.
//!
//! Hardware counts them exactly, but cannot stop at a count: its overflow comes late, by a number of branches that varies
//! (the skid). So a position is approached in two steps. The counter is armed to overflow a [`policy::Margin`] before it;
//! from there a breakpoint stops the guest each time it comes to the position's RIP, and the count tells whether the position
//! is reached ([`Lander`]).
//!
//! **A position is an arrival at a conditional branch**: the number of branches retired before it, RIP, and a digest of the
//! registers. A kicked guest runs on to its next conditional branch ([`anchor`]) and is stopped there. Between two arrivals
//! at the same branch that branch retires, so count and RIP together name exactly one moment. Elsewhere they do not (a function
//! called twice in a row; `l: inc [m]; jmp l`). A conditional branch is also not a string instruction, cannot leak the trap
//! flag, and as long as the count is not above the target's, the target lies ahead. The digest of the registers detects a
//! counter that miscounts. Where the guest makes an exit by itself, the position is the number of such exits, and no branch is
//! needed.
//!
//! [`Hazard`] lists what hardware and KVM do that would make positions wrong, and what is done about it. Known limit: a guest
//! that enables breakpoints of its own between the overflow and the position, and disables them before the position, does not
//! hit them in a replay, because the host's breakpoint hides them.
//!
//! An engine implements [`SteerableEngine`] and [`TickCounter`]. [`CountingVcpu`] makes it a [`Vcpu`]: it runs the engine as its
//! [`Lander`] says, and where a position was missed it goes back to an earlier state and tries again.

use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::{Exit, Kick, Vcpu, VcpuError};
use crate::ram::Ram;

pub mod anchor;
mod counting;
mod lander;
pub mod policy;
#[cfg(test)]
mod tests;

pub use counting::{CountingState, CountingVcpu};
pub use lander::{Lander, Landings};

/// Counts the conditional branches that the guest retires.
pub trait TickCounter {
    /// The count so far, from an arbitrary start.
    ///
    /// # Errors
    /// The counter did not count all the time, or cannot be opened or read.
    fn read(&mut self) -> Result<u64, LandingError>;

    /// Requests one [`LandingStop::Signal`] when about `ticks` more branches have retired. It may come early, late, twice or
    /// never.
    ///
    /// # Errors
    /// The counter cannot be armed.
    fn arm(&mut self, ticks: u64) -> Result<(), LandingError>;

    /// Withdraws the request. The signal may come anyway.
    ///
    /// # Errors
    /// The counter cannot be disarmed.
    fn disarm(&mut self) -> Result<(), LandingError>;
}

/// How to run the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunRequest {
    /// Stop before the instruction at this address.
    pub breakpoint: Option<u64>,
    /// Pass the breakpoint at which the guest has stopped, by setting RFLAGS.RF.
    pub resume: bool,
    /// Stop after the next instruction, by setting RFLAGS.TF.
    pub step: bool,
    /// Stop as soon as the guest can take an interrupt. If a breakpoint is at the same boundary, this stop comes first.
    pub window: bool,
}

/// Why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LandingStop {
    /// The guest made an exit, or can take an interrupt. Never [`Exit::Reached`] or [`Exit::Kicked`].
    Exit(Exit),
    /// The guest is before the instruction at [`RunRequest::breakpoint`].
    Breakpoint,
    /// The guest is after the instruction that was to be stepped.
    Stepped,
    /// A signal came, perhaps from the counter.
    Signal,
    /// A [`super::Kick`] came, perhaps with a signal.
    Kicked,
}

/// Where the guest has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopPoint {
    /// RIP.
    pub rip: u64,
    /// Digest of the registers that must be equal in a replay: general registers, RFLAGS without RF and TF, CR3.
    pub registers: u64,
    /// Whether an interrupt shadow, after STI or a load of SS, delays interrupts.
    pub shadow: bool,
    /// Whether an exception or interrupt is being delivered. It would be lost if registers were written now.
    pub in_flight: bool,
    /// Whether the guest steps itself (RFLAGS.TF) or has breakpoints enabled (DR7).
    pub debugs_itself: bool,
}

/// An engine that can be run to a breakpoint, a single step or a signal, and inspected where it stopped.
pub trait SteerableEngine: Send {
    /// The engine as a vCPU, for everything except running it, kicking it and positions.
    fn vcpu(&self) -> &dyn Vcpu;

    /// See [`SteerableEngine::vcpu`].
    fn vcpu_mut(&mut self) -> &mut dyn Vcpu;

    /// To be called once before each [`Vcpu::run`] starts the engine. `time_offset_ns` is [`super::Limit::time_offset_ns`].
    fn prepare(&mut self, ram: &mut Ram, time_offset_ns: u64);

    /// Runs the guest until it stops. A signal or kick that came before the call stops it at once, but only once.
    fn run_until_stop(&mut self, ram: &mut Ram, go: RunRequest) -> Result<LandingStop, VcpuError>;

    /// Inspects the guest where it has stopped.
    fn stop_point(&mut self) -> Result<StopPoint, VcpuError>;

    /// Copies the code that the guest would fetch at a linear address, and returns its length: 0 where the fetch would fault.
    fn fetch_code(&mut self, ram: &mut Ram, at: u64, bytes: &mut anchor::CodeBytes) -> usize;

    /// Clears RFLAGS.RF. Only called where a breakpoint has stopped the guest.
    fn clear_resume_flag(&mut self) -> Result<(), VcpuError>;

    /// The counter of the guest's branches.
    fn counter(&mut self) -> &mut dyn TickCounter;

    /// Takes a kick that has not stopped the guest yet. `true`: there was one.
    fn take_kick(&mut self) -> bool;

    /// A handle that stops [`SteerableEngine::run_until_stop`] from other threads.
    fn kicker(&self) -> Arc<dyn Kick>;
}

/// [`StopPoint::registers`]: the digest of general registers, RFLAGS and CR3.
pub fn registers_digest(gpr: &[u64; 16], rflags: u64, cr3: u64) -> u64 {
    /// TF and RF, which the host sets for its own use.
    const HOST: u64 = 1 << 8 | 1 << 16;
    let mut words = [0; 18];
    words[..16].copy_from_slice(gpr);
    (words[16], words[17]) = (rflags & !HOST, cr3);
    XxHash3_64::oneshot(words.map(u64::to_le_bytes).as_flattened())
}

/// The guest cannot be stopped at a position.
#[derive(Debug, thiserror::Error)]
pub enum LandingError {
    /// The counter is no longer exact, or cannot be read: this host cannot count positions (see `vmft doctor`).
    #[error("the branch counter {0}")]
    Counter(&'static str),
    /// The counter is not available on this host (see `vmft doctor`).
    #[error("the branch counter cannot be opened: {0}; run vmft doctor to see why")]
    Open(#[source] std::io::Error),
    /// The branch count is the recorded one but the guest's state is not: the counter miscounts, or the replay has diverged.
    #[error("at branch {branches}, RIP {rip:#x}: the branch count is as recorded, but {what}")]
    WrongState {
        /// How many branches have retired.
        branches: u64,
        /// The guest's RIP.
        rip: u64,
        /// What differs from the recording.
        what: &'static str,
    },
    /// The breakpoint cannot be passed: RFLAGS.RF has no effect, and a single step would be visible to the guest.
    #[error("the breakpoint at RIP {rip:#x} cannot be passed without the guest noticing")]
    Stuck {
        /// The guest's RIP.
        rip: u64,
    },
}

/// What would make positions wrong, and how the lander prevents it. For each there is a test that fails if it is not handled
/// (`tests`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hazard {
    /// Away from conditional branches count and RIP are ambiguous, and a kick may stop the guest inside REP, in an interrupt
    /// shadow or with an exception in flight. So a kicked guest runs on to a conditional branch.
    AmbiguousPlace,
    /// An arrival may be in an interrupt shadow. It is not a position then.
    Shadow,
    /// An interrupt handler that retires no conditional branch returns to the last position. So each count has one position
    /// only.
    SameCount,
    /// The host's breakpoint hides the guest's own, and passing it clears the guest's TF. So there is no position while the guest
    /// debugs itself.
    GuestDebugs,
    /// The guest may make an exit by itself before a kick has stopped it. It is stopped at the instruction boundary after the
    /// exit then.
    OwedKick,
    /// An overflow may come so late that the count is past the target. That is reported as an overshoot.
    LateOverflow,
    /// An overflow may never come. Then the guest makes an exit that it made only after the target, which is reported as an
    /// overshoot.
    LostOverflow,
    /// An overflow may come early, twice, or from an earlier arming. So the counter is read at every stop.
    EarlyOverflow,
    /// The breakpoint may be hit before the count is the target's. It is passed then.
    EarlierArrivals,
    /// RFLAGS.RF may have no effect (in KVM's emulator). When the same hit comes again, it is passed by a single step.
    IgnoredResumeFlag,
    /// A fault during a single step pushes the host's TF, and a step clears the guest's own. So there is no step where that could
    /// happen.
    LeakingTrapFlag,
    /// A stop may leave RFLAGS.RF set, which the next interrupt's frame would show. It is cleared before anything is injected.
    LeftResumeFlag,
    /// The counter does not go back with a restored state. So positions are counted on from the saved one.
    Restored,
    /// The counter may miscount. So the registers at the target are compared with the recorded ones.
    Miscount,
}
