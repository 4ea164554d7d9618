//! Tracks the position of an engine that counts branches, and stops it exactly at recorded positions.

use std::cmp::Ordering;

use entry::Position;
use serde::{Deserialize, Serialize};

use crate::ram::Ram;

use super::policy::{self, Approach, Margin};
use super::{
    Exit, Hazard, LandingError, LandingStop, RunRequest, SteerableEngine, StopPoint, VcpuError, anchor,
};
use crate::vcpu::Limit;

/// How often a conditional branch is looked for before a kicked guest may run on to its next exit.
const ANCHOR_TRIES: u32 = 64;
/// After this many branches a guest that has not reached the expected branch is stopped to look for another one.
const ANCHOR_BRANCHES_MAX: u64 = 1000;

/// Statistics of landings, for reports. They are not part of the machine's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Landings {
    /// How many kicks stopped the guest at a branch.
    pub anchored: u64,
    /// How many kicks found no branch and stopped the guest at its next exit.
    pub starved: u64,
    /// How many recorded positions a replay has stopped at.
    pub landed: u64,
    /// How many breakpoints were hit before their position was reached.
    pub passed: u64,
    /// How many positions were missed and tried again from an earlier state, with twice the margin.
    pub retries: u64,
}

/// Where the guest is, in exits and branches.
#[derive(Clone, Copy, Debug)]
pub struct LandingProgress {
    /// Exits that the guest has made by itself.
    exits: u64,
    /// Branches that had retired at the last stop.
    branches: u64,
    /// No instruction has run since the last of `exits` was completed.
    at_exit: bool,
    halted: bool,
    /// The position of the branch at which the guest was stopped last.
    landed: Option<Position>,
    /// The last position at which the guest was.
    last: Position,
}

/// Decides how to run a steerable engine, and tracks its position.
pub struct Lander {
    margin: Margin,
    now: LandingProgress,
    /// Added to the counter's reading, gives the branches of the position.
    offset: u64,
    /// A kick has come and is not answered yet.
    kick_owed: bool,
    /// How often a branch was looked for to answer this kick.
    anchor_tries: u32,
    /// The guest has no position, which the caller was told by [`Exit::Between`].
    between: bool,
    stats: Landings,
    /// The hazard that is not handled, so that a test can show its effect.
    #[cfg(test)]
    pub(super) ignored_hazard: Option<Hazard>,
}

impl Lander {
    /// A lander at the start of a guest, for a counter whose overflows are no later than `margin`.
    pub fn new(margin: Margin) -> Lander {
        Lander {
            margin,
            now: LandingProgress {
                exits: 0,
                branches: 0,
                at_exit: true,
                halted: false,
                landed: None,
                last: Position::default(),
            },
            offset: 0,
            kick_owed: false,
            anchor_tries: 0,
            between: false,
            stats: Landings::default(),
            #[cfg(test)]
            ignored_hazard: None,
        }
    }

    /// Whether this hazard is handled. Only tests leave one out.
    #[cfg(test)]
    fn handles(&self, hazard: Hazard) -> bool {
        self.ignored_hazard != Some(hazard)
    }

    #[cfg(not(test))]
    fn handles(&self, _: Hazard) -> bool {
        true
    }

    /// The guest's position. Away from branches and exits it has counts only, and orders before the next branch's position.
    /// After [`Exit::Between`] it is the last position.
    pub fn position(&self) -> Position {
        match self.now.landed {
            _ if self.between => self.now.last,
            Some(at) if (at.count, at.within) == (self.now.exits, self.now.branches) => at,
            _ => self.position_here(0, 0),
        }
    }

    /// The position with the present counts.
    fn position_here(&self, rip: u64, registers: u64) -> Position {
        Position { count: self.now.exits, within: self.now.branches, rip, registers }
    }

    /// Statistics so far.
    pub fn stats(&self) -> Landings {
        self.stats
    }

    /// Where the guest is, for [`Lander::retry_from`].
    pub fn progress(&self) -> LandingProgress {
        self.now
    }

    /// To be called when the guest was put back to where it was at `progress`, because of `missed`. Widens the margin for the
    /// next try.
    ///
    /// # Errors
    /// `missed`, if the margin is already at its maximum, so that skid is not the cause.
    pub fn retry_from<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        progress: LandingProgress,
        missed: VcpuError,
    ) -> Result<(), VcpuError> {
        self.margin = self.margin.widened().ok_or(missed)?;
        self.stats.retries += 1;
        if self.handles(Hazard::Restored) {
            self.offset = progress.branches.wrapping_sub(engine.counter().read()?);
        }
        self.now = progress;
        Ok(())
    }

    /// Whether the position of `limit` is so far away that the run to it starts without a breakpoint, and so may miss it.
    pub fn may_miss(&self, limit: &Limit) -> bool {
        let target = limit.until.filter(|at| at.rip != 0 && at.count == self.now.exits);
        let step = target.map(|at| policy::next_approach(self.now.branches, at.within, self.margin.ticks()));
        matches!(step, Some(Approach::RunFree(_)))
    }

    /// To be called when the access of the guest's exit is completed.
    pub fn access_completed<E: SteerableEngine>(&mut self, engine: &mut E) -> Result<(), VcpuError> {
        self.read_counter(engine)?;
        self.now.exits += 1;
        self.now.at_exit = true;
        self.now.last = self.position_here(0, 0);
        Ok(())
    }

    /// To be called when the guest was reset. Its position goes on counting.
    pub fn reset<E: SteerableEngine>(&mut self, engine: &mut E) -> Result<(), VcpuError> {
        self.offset = self.now.branches.wrapping_sub(engine.counter().read()?);
        (self.now.at_exit, self.now.halted, self.now.landed) = (true, false, None);
        self.now.last = self.position_here(0, 0);
        Ok(())
    }

    /// To be called when an interrupt was injected: the guest is no longer at an exit.
    pub fn interrupt_injected(&mut self) {
        self.now.at_exit = false;
        self.now.halted = false;
    }

    /// To be called when the engine has restored a state that was saved at `at`: [`Lander::position`] goes on from there.
    pub fn state_restored<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        at: Position,
        halted: bool,
    ) -> Result<(), VcpuError> {
        if self.handles(Hazard::Restored) {
            self.offset = at.within.wrapping_sub(engine.counter().read()?);
        }
        self.read_counter(engine)?;
        (self.now.exits, self.now.at_exit, self.now.halted) = (at.count, at.rip == 0, halted);
        (self.now.landed, self.now.last) = ((at.rip != 0).then_some(at), at);
        Ok(())
    }

    /// If the guest is to be stopped after the exit at which it is, finishes the exit's instruction. `Some`: the next access of
    /// the same instruction.
    pub fn finish_instruction_if_stopping<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Option<Exit>, VcpuError> {
        if !self.now.at_exit {
            return Ok(None);
        }
        self.kick_owed |= !self.now.halted && engine.take_kick();
        let stops = self.kick_owed || limit.until.is_some_and(|until| until.count <= self.now.exits);
        if stops { engine.vcpu_mut().finish_instruction(ram) } else { Ok(None) }
    }

    /// Runs the guest as [`crate::vcpu::Vcpu::run`] does. To be called after [`Lander::finish_instruction_if_stopping`].
    ///
    /// # Errors
    /// [`VcpuError::Overshot`] if the target was missed: go back to an earlier state and call [`Lander::retry_from`].
    pub fn run<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Exit, VcpuError> {
        let Some(until) = limit.until.filter(|until| until.count <= self.now.exits) else {
            return self.run_free(engine, ram, limit);
        };
        match (until.count, until.within).cmp(&(self.now.exits, self.now.branches)) {
            _ if until == self.position() => Ok(Exit::Reached),
            Ordering::Less => Err(self.overshot(until)),
            _ if until.rip != 0 => self.seek(engine, ram, limit, until),
            Ordering::Equal => Ok(Exit::Reached),
            Ordering::Greater => Err(self.wrong_state(0, "the guest has not made the recorded exit")),
        }
    }

    fn overshot(&self, target: Position) -> VcpuError {
        VcpuError::Overshot { engine: "counting", target, now: self.position_here(0, 0) }
    }

    fn wrong_state(&self, rip: u64, what: &'static str) -> VcpuError {
        LandingError::WrongState { branches: self.now.branches, rip, what }.into()
    }

    /// Updates the count of branches from the counter.
    fn read_counter<E: SteerableEngine>(&mut self, engine: &mut E) -> Result<(), VcpuError> {
        self.now.branches = engine.counter().read()?.wrapping_add(self.offset);
        Ok(())
    }

    /// Runs the guest to its next stop, and updates where it is.
    fn run_and_count<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        request: RunRequest,
    ) -> Result<LandingStop, VcpuError> {
        self.between = false;
        let stop = engine.run_until_stop(ram, request)?;
        self.read_counter(engine)?;
        match stop {
            // The guest is still halted, and has not made another exit.
            LandingStop::Exit(Exit::Halted) if self.now.halted => {}
            LandingStop::Exit(Exit::Halted) => {
                self.now.exits += 1;
                (self.now.halted, self.now.at_exit) = (true, true);
                self.now.last = self.position_here(0, 0);
            }
            LandingStop::Kicked => {
                (self.kick_owed, self.anchor_tries) = (true, 0);
                self.now.at_exit &= self.now.halted;
            }
            _ => self.now.at_exit &= self.now.halted,
        }
        Ok(stop)
    }

    /// Runs the guest to its next exit, or to a position at which a kick can be answered.
    fn run_free<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Exit, VcpuError> {
        loop {
            // If the guest is halted, its time may have been changed since, so that this is no longer a position.
            if self.kick_owed && self.now.at_exit && !self.now.halted {
                self.kick_owed = false;
                return Ok(Exit::Kicked);
            }
            if self.kick_owed && self.anchor_tries < ANCHOR_TRIES {
                self.anchor_tries += 1;
                if let Some(exit) = self.run_to_anchor(engine, ram, limit)? {
                    return Ok(exit);
                }
                if self.anchor_tries == ANCHOR_TRIES {
                    self.stats.starved += 1;
                    self.between = true;
                    return Ok(Exit::Between);
                }
                continue;
            }
            let request = RunRequest { window: limit.interrupt_window, ..RunRequest::default() };
            if let LandingStop::Exit(exit) = self.run_and_count(engine, ram, request)? {
                return Ok(self.exited(exit));
            }
        }
    }

    /// The guest has made an exit, perhaps before a kick could be answered.
    fn exited(&mut self, exit: Exit) -> Exit {
        self.kick_owed &= self.handles(Hazard::OwedKick);
        exit
    }

    /// Runs a kicked guest to a branch at which it can be stopped, or to its next exit. `None`: it has come to neither yet.
    fn run_to_anchor<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Option<Exit>, VcpuError> {
        if !self.handles(Hazard::AmbiguousPlace) {
            let point = engine.stop_point()?;
            return Ok(Some(self.stop_here(engine, point)?));
        }
        let point = engine.stop_point()?;
        let branch =
            anchor::next_conditional_branch(|at, bytes| engine.fetch_code(ram, at, bytes), point.rip);
        let hidden = self.handles(Hazard::GuestDebugs) && point.debugs_itself;
        let breakpoint = if hidden { None } else { branch };
        let window = limit.interrupt_window;
        let mut stop =
            self.run_briefly(engine, ram, RunRequest { breakpoint, window, ..RunRequest::default() })?;
        if stop == LandingStop::Breakpoint {
            let point = engine.stop_point()?;
            if self.is_position(&point) {
                return Ok(Some(self.stop_here(engine, point)?));
            }
            stop = self.run_briefly(engine, ram, RunRequest { window, ..RunRequest::default() })?;
        }
        Ok(match stop {
            LandingStop::Exit(exit) => Some(self.exited(exit)),
            _ => None,
        })
    }

    /// Runs a kicked guest for a short time, even if it does not come to the breakpoint.
    fn run_briefly<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        request: RunRequest,
    ) -> Result<LandingStop, VcpuError> {
        engine.counter().arm(if request.breakpoint.is_some() { ANCHOR_BRANCHES_MAX } else { 1 })?;
        let stop = self.run_and_count(engine, ram, request);
        engine.counter().disarm()?;
        stop
    }

    /// Whether an arrival at a branch can be a position.
    fn is_position(&self, point: &StopPoint) -> bool {
        let last = self.now.landed.filter(|at| at.count == self.now.exits);
        let again = last.is_some_and(|at| at.within == self.now.branches) && self.handles(Hazard::SameCount);
        let shadow = point.shadow && self.handles(Hazard::Shadow);
        let debugs = point.debugs_itself && self.handles(Hazard::GuestDebugs);
        !(again || shadow || debugs || point.in_flight)
    }

    /// Answers the kick at the branch before which the guest has stopped.
    fn stop_here<E: SteerableEngine>(&mut self, engine: &mut E, point: StopPoint) -> Result<Exit, VcpuError> {
        self.set_landed(engine, point)?;
        self.kick_owed = false;
        self.stats.anchored += 1;
        Ok(Exit::Kicked)
    }

    /// Makes the branch before which the guest has stopped its position.
    fn set_landed<E: SteerableEngine>(&mut self, engine: &mut E, point: StopPoint) -> Result<(), VcpuError> {
        if self.handles(Hazard::LeftResumeFlag) {
            engine.clear_resume_flag()?;
        }
        self.now.last = self.position_here(point.rip, point.registers);
        self.now.landed = Some(self.now.last);
        Ok(())
    }

    /// Runs the guest to a target that lies before its next exit.
    fn seek<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        limit: &Limit,
        target: Position,
    ) -> Result<Exit, VcpuError> {
        let window = limit.interrupt_window;
        let mut stop = self.approach(engine, ram, window, target)?;
        loop {
            stop = match stop {
                LandingStop::Breakpoint => {
                    let point = engine.stop_point()?;
                    if self.is_arrival(&point, target)? {
                        self.set_landed(engine, point)?;
                        // The caller compares the position with the recorded one.
                        (self.now.branches, self.now.landed) = (target.within, Some(target));
                        self.now.last = target;
                        self.stats.landed += 1;
                        return Ok(Exit::Reached);
                    }
                    self.pass_breakpoint(engine, ram, window, point)?
                }
                LandingStop::Exit(exit @ (Exit::InterruptWindow | Exit::Shutdown)) => return Ok(exit),
                // The guest is still halted, and its time has to be changed first.
                LandingStop::Exit(Exit::Halted) if self.now.exits == target.count => return Ok(Exit::Halted),
                // The target was before this exit.
                LandingStop::Exit(_) if self.handles(Hazard::LostOverflow) => {
                    return Err(self.overshot(target));
                }
                LandingStop::Exit(exit) => return Ok(exit),
                _ => self.approach(engine, ram, window, target)?,
            };
        }
    }

    /// Runs the guest towards the target, by the counter or by a breakpoint.
    fn approach<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        window: bool,
        target: Position,
    ) -> Result<LandingStop, VcpuError> {
        match policy::next_approach(self.now.branches, target.within, self.margin.ticks()) {
            Approach::Overshot if self.handles(Hazard::LateOverflow) => Err(self.overshot(target)),
            Approach::RunFree(ticks) => {
                engine.counter().arm(ticks)?;
                let stop = self.run_and_count(engine, ram, RunRequest { window, ..RunRequest::default() });
                engine.counter().disarm()?;
                if !self.handles(Hazard::EarlyOverflow) && matches!(stop, Ok(LandingStop::Signal)) {
                    // Behave as if the signal came exactly where it was armed for.
                    self.offset = self
                        .offset
                        .wrapping_add(target.within - self.margin.ticks())
                        .wrapping_sub(self.now.branches);
                }
                stop
            }
            _ => self.run_and_count(
                engine,
                ram,
                RunRequest { breakpoint: Some(target.rip), window, ..RunRequest::default() },
            ),
        }
    }

    /// Whether the guest, which is at the target's RIP, has reached the target.
    fn is_arrival(&self, point: &StopPoint, target: Position) -> Result<bool, VcpuError> {
        if self.now.branches < target.within && self.handles(Hazard::EarlierArrivals) {
            return Ok(false);
        }
        if self.now.branches > target.within && self.handles(Hazard::LateOverflow) {
            return Err(self.overshot(target));
        }
        if point.registers != target.registers && self.handles(Hazard::Miscount) {
            return Err(self.wrong_state(point.rip, "the registers differ"));
        }
        Ok(true)
    }

    /// Runs the guest past the breakpoint at which it has stopped.
    fn pass_breakpoint<E: SteerableEngine>(
        &mut self,
        engine: &mut E,
        ram: &mut Ram,
        window: bool,
        point: StopPoint,
    ) -> Result<LandingStop, VcpuError> {
        self.stats.passed += 1;
        let before = self.now.branches;
        let request = RunRequest { breakpoint: Some(point.rip), resume: true, step: false, window };
        let stop = self.run_and_count(engine, ram, request)?;
        let again =
            stop == LandingStop::Breakpoint && self.now.branches == before && engine.stop_point()? == point;
        if !again || !self.handles(Hazard::IgnoredResumeFlag) {
            return Ok(stop);
        }
        // If the step faulted, it would push TF. A branch can fault only by its fetch (or an invalid target).
        let fetched = anchor::decode(&mut |at, bytes| engine.fetch_code(ram, at, bytes), point.rip).is_some();
        if (!fetched || point.debugs_itself) && self.handles(Hazard::LeakingTrapFlag) {
            return Err(LandingError::Stuck { rip: point.rip }.into());
        }
        self.run_and_count(engine, ram, RunRequest { breakpoint: None, resume: false, step: true, window })
    }
}
