//! Exact positions by a counter of retired conditional branches.
//!
//! Hardware counts them exactly, and cannot stop at a count: its overflow comes late, by more or less. So a position is
//! approached in two steps. The counter is armed for a [`policy::Margin`] before it; the rest of the way goes by a
//! breakpoint, and at each hit the count says whether this is the one ([`lander`]).
//!
//! **A position is an arrival at a conditional branch**: the branches retired before, RIP, and a digest of the registers.
//! A guest that was kicked is let on to its next conditional branch ([`anchor`]) and stopped there. Between two arrivals
//! at the same branch that branch retires, so count and RIP name one moment and no other, which they do not elsewhere
//! (a function called twice in a row; `l: inc [m]; jmp l`). It is no string instruction, it can leak no trap flag, and
//! as long as the count is at or below the target's, the target lies ahead. The registers tell a counter that miscounts.
//! Where the guest leaves to its engine on its own, the position is the number of such exits, and no branch is sought.
//!
//! What hardware and KVM do that would spoil it, and what is done about it, is in [`Trap`]. Known limit: a guest that
//! has breakpoints of its own enabled on the last stretch of a replay and not at its end does not meet them, for the
//! host's breakpoint hides them.
//!
//! An engine brings [`Steered`] and [`TickCounter`]; [`Counted`] makes a [`Vcpu`] of it, which asks its [`Lander`] how to
//! run, and goes back and tries again where a position was missed.

use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::{Exit, Kick, Vcpu, VcpuError};
use crate::ram::Ram;

pub mod anchor;
mod counted;
mod lander;
pub mod policy;
#[cfg(test)]
mod tests;

pub use counted::{Counted, CountedState};
pub use lander::{Lander, Landings};

/// Counts the conditional branches that the guest retires.
pub trait TickCounter {
    /// How many so far, from an arbitrary start.
    fn read(&mut self) -> Result<u64, LandingError>;

    /// Asks for one [`Stop::Signal`] about when so many more have retired. It may come early, late, twice or never.
    fn arm(&mut self, ticks: u64) -> Result<(), LandingError>;

    /// Asks for none any more. One may come all the same.
    fn disarm(&mut self) -> Result<(), LandingError>;
}

/// How to run the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Go {
    /// Stop before the instruction here.
    pub breakpoint: Option<u64>,
    /// Pass the breakpoint once, by RFLAGS.RF.
    pub resume: bool,
    /// Stop behind the next instruction, by RFLAGS.TF.
    pub step: bool,
    /// Stop as soon as the guest takes interrupts. At one boundary this comes before the breakpoint.
    pub window: bool,
}

/// Why it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest left by itself, or its window opened. Never [`Exit::Reached`] or [`Exit::Kicked`].
    Exit(Exit),
    /// Before the instruction at [`Go::breakpoint`].
    Breakpoint,
    /// Behind the instruction that was to be stepped.
    Stepped,
    /// A signal: of the counter, perhaps.
    Signal,
    /// A [`super::Kick`], perhaps with a signal.
    Kicked,
}

/// Where the guest stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// RIP.
    pub rip: u64,
    /// Digest of what must be equal: general registers, RFLAGS without RF and TF, CR3.
    pub registers: u64,
    /// STI or a load of SS holds off interrupts.
    pub shadow: bool,
    /// An exception or interrupt is on its way: nothing may be written to registers, or it is lost.
    pub in_flight: bool,
    /// The guest steps itself (RFLAGS.TF) or has breakpoints enabled (DR7).
    pub debugs_itself: bool,
}

/// An engine below its [`super::Vcpu`]: run raw, and looked at where it stopped.
pub trait Steered: Send {
    /// The engine, for all but running, kicking and positions.
    fn engine(&self) -> &dyn Vcpu;

    /// See [`Steered::engine`].
    fn engine_mut(&mut self) -> &mut dyn Vcpu;

    /// Precedes [`Steered::go`], once a run: guest time minus what the engine itself adds, in ns.
    fn prepare(&mut self, ram: &mut Ram, time_offset_ns: u64);

    /// Runs the guest until something happens. A signal or kick that comes before the run stops it at once, and once.
    fn go(&mut self, ram: &mut Ram, go: Go) -> Result<Stop, VcpuError>;

    /// Where the guest is.
    fn place(&mut self) -> Result<Place, VcpuError>;

    /// Copies what a fetch would find at a linear address, and says how many bytes that are: 0 where it would fault.
    fn code(&mut self, ram: &mut Ram, at: u64, bytes: &mut anchor::Code) -> usize;

    /// Clears RFLAGS.RF. Asked only where a breakpoint stopped the guest.
    fn clear_resume_flag(&mut self) -> Result<(), VcpuError>;

    /// Its counter.
    fn counter(&mut self) -> &mut dyn TickCounter;

    /// Takes a kick that has not stopped the guest yet.
    fn take_kick(&mut self) -> bool;

    /// A handle that stops [`Steered::go`] from other threads.
    fn kicker(&self) -> Arc<dyn Kick>;
}

/// [`Place::registers`] of general registers, RFLAGS and CR3.
pub fn registers_digest(gpr: &[u64; 16], rflags: u64, cr3: u64) -> u64 {
    /// TF and RF.
    const HOST: u64 = 1 << 8 | 1 << 16;
    let mut words = [0; 18];
    words[..16].copy_from_slice(gpr);
    (words[16], words[17]) = (rflags & !HOST, cr3);
    XxHash3_64::oneshot(words.map(u64::to_le_bytes).as_flattened())
}

/// A position cannot be landed on.
#[derive(Debug, thiserror::Error)]
pub enum LandingError {
    /// The counter stopped being exact or could not be read: this host cannot keep positions (see `vmft doctor`).
    #[error("the branch counter: {0}")]
    Counter(&'static str),
    /// The counter cannot be had (see `vmft doctor`).
    #[error("the branch counter cannot be opened: {0}")]
    Open(#[source] std::io::Error),
    /// The count is right and the guest is not: the counter miscounts, or the sides have diverged.
    #[error("at branch {branches}, RIP {rip:#x}: the count is the recorded one, but {what} not")]
    Elsewhere {
        /// Branches retired.
        branches: u64,
        /// RIP.
        rip: u64,
        /// What differs.
        what: &'static str,
    },
    /// The breakpoint cannot be passed here: RF has no effect and stepping would show in the guest.
    #[error("RIP {rip:#x}: a breakpoint there cannot be passed without a trace")]
    Stuck {
        /// RIP.
        rip: u64,
    },
}

/// What landing has to deal with, each with a test that fails without (`tests`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// Count and RIP are ambiguous away from conditional branches, and a kick stops inside REP, in an interrupt shadow,
    /// or with an exception in flight: on to a conditional branch.
    Anywhere,
    /// An arrival in an interrupt shadow: not a position.
    Shadow,
    /// A handler that retires no conditional branch comes back to where the last position was: one position a count.
    SameCount,
    /// The host's breakpoint hides those of the guest, and passing it clears its TF: no position while it debugs itself.
    GuestDebugs,
    /// A kick is due when the guest leaves by itself: it stops at the whole boundary behind that.
    OwedKick,
    /// An overflow came late: the count is past the target and that is said.
    Late,
    /// An overflow came never: the guest leaves by itself once more than it did before the target.
    Lost,
    /// An overflow came early, or twice, or of an earlier arming: the counter is asked at every stop.
    Early,
    /// The breakpoint is hit before the target's count.
    EarlierArrivals,
    /// RF without effect (KVM's emulator): TF, when the same hit comes again.
    IgnoredResumeFlag,
    /// TF in a frame that a fault pushes, or the guest's own TF lost: no step where that could be.
    LeakingTrapFlag,
    /// RF left set by the stop, as the next frame would show: cleared before anything is injected.
    LeftResumeFlag,
    /// The counter goes on over a restored state: positions are counted from what was saved.
    Restored,
    /// The counter miscounts: the registers at the target are compared.
    Miscount,
}
