//! The driver: keeps the position of an engine that counts branches, and lands it on others.

use std::cmp::Ordering;

use entry::Position;
use serde::{Deserialize, Serialize};

use crate::ram::Ram;

use super::policy::{self, Margin, Step};
use super::{Exit, Go, LandingError, Place, Steered, Stop, Trap, VcpuError, anchor};
use crate::vcpu::Limit;

/// Tries to find a conditional branch before a kicked guest is let run to its next exit.
const TRIES: u32 = 64;
/// Branches after which a guest that did not come to the branch expected is looked at again.
const LOOK_AGAIN: u64 = 1000;

/// What happened so far, for reports. Not state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Landings {
    /// Kicked guests that were stopped at a branch.
    pub anchored: u64,
    /// Kicked guests that came to no branch and were stopped at their next exit.
    pub starved: u64,
    /// Positions landed on.
    pub landed: u64,
    /// Breakpoints that were no arrival yet.
    pub passed: u64,
    /// Positions that were missed, and sought again from a state before with twice the margin.
    pub retries: u64,
}

/// Where the guest is, as far as exits and branches tell.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Exits that the guest made by itself.
    exits: u64,
    /// Branches retired at the last stop.
    branches: u64,
    /// Nothing has run since the last of `exits` was completed.
    whole: bool,
    halted: bool,
    /// The branch at which the guest was stopped last.
    landed: Option<Position>,
    /// The last place at which it could be stopped.
    last: Position,
}

/// See the module.
pub struct Lander {
    margin: Margin,
    now: Mark,
    /// To be added to the counter.
    offset: u64,
    /// A kick was taken and not yet answered.
    owed: bool,
    /// Tries to stop the guest for the kick that is owed.
    tries: u32,
    /// The guest stands where it cannot be stopped for good, and the caller knows.
    between: bool,
    stats: Landings,
    /// The trap that is left alone, to see what comes of it.
    #[cfg(test)]
    pub(super) without: Option<Trap>,
}

impl Lander {
    /// A lander for a counter that has shown this margin, at the start of a guest.
    pub fn new(margin: Margin) -> Lander {
        Lander {
            margin,
            now: Mark {
                exits: 0,
                branches: 0,
                whole: true,
                halted: false,
                landed: None,
                last: Position::default(),
            },
            offset: 0,
            owed: false,
            tries: 0,
            between: false,
            stats: Landings::default(),
            #[cfg(test)]
            without: None,
        }
    }

    #[cfg(test)]
    fn minds(&self, trap: Trap) -> bool {
        self.without != Some(trap)
    }

    #[cfg(not(test))]
    fn minds(&self, _: Trap) -> bool {
        true
    }

    /// Where the guest is. Away from branches and exits that is a count only, which orders before the branch ahead;
    /// after [`Exit::Between`] it is the last position.
    pub fn position(&self) -> Position {
        match self.now.landed {
            _ if self.between => self.now.last,
            Some(at) if (at.count, at.within) == (self.now.exits, self.now.branches) => at,
            _ => self.here(0, 0),
        }
    }

    fn here(&self, rip: u64, registers: u64) -> Position {
        Position { count: self.now.exits, within: self.now.branches, rip, registers }
    }

    /// What happened so far.
    pub fn stats(&self) -> Landings {
        self.stats
    }

    /// Where the guest is, to go [`Lander::back`] there.
    pub fn mark(&self) -> Mark {
        self.now
    }

    /// The guest was put back to where it was at `mark`, after `missed`: the next try is more careful.
    ///
    /// # Errors
    /// `missed`, when the margin is as wide as it may be: then the trouble is another one.
    pub fn back<H: Steered>(&mut self, host: &mut H, mark: Mark, missed: VcpuError) -> Result<(), VcpuError> {
        self.margin = self.margin.widened().ok_or(missed)?;
        self.stats.retries += 1;
        if self.minds(Trap::Restored) {
            self.offset = mark.branches.wrapping_sub(host.counter().read()?);
        }
        self.now = mark;
        Ok(())
    }

    /// The way to `limit` is so long that it begins without a breakpoint, so that it may be missed.
    pub fn may_miss(&self, limit: &Limit) -> bool {
        let target = limit.until.filter(|at| at.rip != 0 && at.count == self.now.exits);
        let step = target.map(|at| policy::next(self.now.branches, at.within, self.margin.ticks()));
        matches!(step, Some(Step::RunFree(_)))
    }

    /// The access that the guest left for is done.
    pub fn completed<H: Steered>(&mut self, host: &mut H) -> Result<(), VcpuError> {
        self.look(host)?;
        self.now.exits += 1;
        self.now.whole = true;
        self.now.last = self.here(0, 0);
        Ok(())
    }

    /// The guest starts over; its position goes on.
    pub fn reset<H: Steered>(&mut self, host: &mut H) -> Result<(), VcpuError> {
        self.offset = self.now.branches.wrapping_sub(host.counter().read()?);
        (self.now.whole, self.now.halted, self.now.landed) = (true, false, None);
        self.now.last = self.here(0, 0);
        Ok(())
    }

    /// An interrupt was injected: the guest is at a whole boundary no more.
    pub fn injected(&mut self) {
        self.now.whole = false;
        self.now.halted = false;
    }

    /// The engine took over a state that was saved at `at`: [`Lander::position`] goes on from there.
    pub fn restored<H: Steered>(
        &mut self,
        host: &mut H,
        at: Position,
        halted: bool,
    ) -> Result<(), VcpuError> {
        if self.minds(Trap::Restored) {
            self.offset = at.within.wrapping_sub(host.counter().read()?);
        }
        self.look(host)?;
        (self.now.exits, self.now.whole, self.now.halted) = (at.count, at.rip == 0, halted);
        (self.now.landed, self.now.last) = ((at.rip != 0).then_some(at), at);
        Ok(())
    }

    /// Finishes an access where the guest is to be stopped, so that it is a whole boundary. `Some`: what the same
    /// instruction asks next.
    pub fn settle<H: Steered>(
        &mut self,
        host: &mut H,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Option<Exit>, VcpuError> {
        if !self.now.whole {
            return Ok(None);
        }
        self.owed |= !self.now.halted && host.take_kick();
        let stops = self.owed || limit.until.is_some_and(|until| until.count <= self.now.exits);
        if stops { host.engine_mut().settle(ram) } else { Ok(None) }
    }

    /// Runs the guest as [`crate::vcpu::Vcpu::run`] does, after [`Lander::settle`].
    ///
    /// # Errors
    /// [`VcpuError::Overshot`] when the target was missed: restore an earlier state, widen the margin, try again.
    pub fn run<H: Steered>(&mut self, host: &mut H, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        let Some(until) = limit.until.filter(|until| until.count <= self.now.exits) else {
            return self.run_free(host, ram, limit);
        };
        match (until.count, until.within).cmp(&(self.now.exits, self.now.branches)) {
            _ if until == self.position() => Ok(Exit::Reached),
            Ordering::Less => Err(self.overshot(until)),
            _ if until.rip != 0 => self.seek(host, ram, limit, until),
            Ordering::Equal => Ok(Exit::Reached),
            Ordering::Greater => Err(self.elsewhere(0, "the guest's exit is")),
        }
    }

    fn overshot(&self, target: Position) -> VcpuError {
        VcpuError::Overshot { engine: "counting", target, now: self.here(0, 0) }
    }

    fn elsewhere(&self, rip: u64, what: &'static str) -> VcpuError {
        LandingError::Elsewhere { branches: self.now.branches, rip, what }.into()
    }

    fn look<H: Steered>(&mut self, host: &mut H) -> Result<(), VcpuError> {
        self.now.branches = host.counter().read()?.wrapping_add(self.offset);
        Ok(())
    }

    /// Lets the guest go, and takes down what came of it.
    fn go<H: Steered>(&mut self, host: &mut H, ram: &mut Ram, go: Go) -> Result<Stop, VcpuError> {
        self.between = false;
        let stop = host.go(ram, go)?;
        self.look(host)?;
        match stop {
            // A guest that still halts has not left once more.
            Stop::Exit(Exit::Halted) if self.now.halted => {}
            Stop::Exit(Exit::Halted) => {
                self.now.exits += 1;
                (self.now.halted, self.now.whole) = (true, true);
                self.now.last = self.here(0, 0);
            }
            Stop::Kicked => {
                (self.owed, self.tries) = (true, 0);
                self.now.whole &= self.now.halted;
            }
            _ => self.now.whole &= self.now.halted,
        }
        Ok(stop)
    }

    fn run_free<H: Steered>(
        &mut self,
        host: &mut H,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Exit, VcpuError> {
        loop {
            // A halted guest's time may have been moved since it came here: this is no position any more.
            if self.owed && self.now.whole && !self.now.halted {
                self.owed = false;
                return Ok(Exit::Kicked);
            }
            if self.owed && self.tries < TRIES {
                self.tries += 1;
                if let Some(exit) = self.anchor(host, ram, limit)? {
                    return Ok(exit);
                }
                if self.tries == TRIES {
                    self.stats.starved += 1;
                    self.between = true;
                    return Ok(Exit::Between);
                }
                continue;
            }
            let go = Go { window: limit.interrupt_window, ..Go::default() };
            if let Stop::Exit(exit) = self.go(host, ram, go)? {
                return Ok(self.left(exit));
            }
        }
    }

    /// The guest left by itself while a kick may be owed.
    fn left(&mut self, exit: Exit) -> Exit {
        self.owed &= self.minds(Trap::OwedKick);
        exit
    }

    /// A kicked guest goes on to a place where it can be stopped for good. `None`: it did not come there.
    fn anchor<H: Steered>(
        &mut self,
        host: &mut H,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Option<Exit>, VcpuError> {
        if !self.minds(Trap::Anywhere) {
            let place = host.place()?;
            return Ok(Some(self.stop_here(host, place)?));
        }
        let place = host.place()?;
        let branch = anchor::next(|at, bytes| host.code(ram, at, bytes), place.rip);
        let hidden = self.minds(Trap::GuestDebugs) && place.debugs_itself;
        let breakpoint = if hidden { None } else { branch };
        let window = limit.interrupt_window;
        let mut stop = self.go_on(host, ram, Go { breakpoint, window, ..Go::default() })?;
        if stop == Stop::Breakpoint {
            let place = host.place()?;
            if self.is_position(&place) {
                return Ok(Some(self.stop_here(host, place)?));
            }
            stop = self.go_on(host, ram, Go { window, ..Go::default() })?;
        }
        Ok(match stop {
            Stop::Exit(exit) => Some(self.left(exit)),
            _ => None,
        })
    }

    /// Lets a kicked guest go, and not for long.
    fn go_on<H: Steered>(&mut self, host: &mut H, ram: &mut Ram, go: Go) -> Result<Stop, VcpuError> {
        host.counter().arm(if go.breakpoint.is_some() { LOOK_AGAIN } else { 1 })?;
        let stop = self.go(host, ram, go);
        host.counter().disarm()?;
        stop
    }

    /// May an arrival at a branch be a position?
    fn is_position(&self, place: &Place) -> bool {
        let last = self.now.landed.filter(|at| at.count == self.now.exits);
        let again = last.is_some_and(|at| at.within == self.now.branches) && self.minds(Trap::SameCount);
        let shadow = place.shadow && self.minds(Trap::Shadow);
        let debugs = place.debugs_itself && self.minds(Trap::GuestDebugs);
        !(again || shadow || debugs || place.in_flight)
    }

    /// The guest stands at a branch, and this is its position.
    fn stop_here<H: Steered>(&mut self, host: &mut H, place: Place) -> Result<Exit, VcpuError> {
        self.land(host, place)?;
        self.owed = false;
        self.stats.anchored += 1;
        Ok(Exit::Kicked)
    }

    fn land<H: Steered>(&mut self, host: &mut H, place: Place) -> Result<(), VcpuError> {
        if self.minds(Trap::LeftResumeFlag) {
            host.clear_resume_flag()?;
        }
        self.now.last = self.here(place.rip, place.registers);
        self.now.landed = Some(self.now.last);
        Ok(())
    }

    /// Runs to a branch of the present stretch between two exits.
    fn seek<H: Steered>(
        &mut self,
        host: &mut H,
        ram: &mut Ram,
        limit: &Limit,
        target: Position,
    ) -> Result<Exit, VcpuError> {
        let window = limit.interrupt_window;
        let mut stop = self.approach(host, ram, window, target)?;
        loop {
            stop = match stop {
                Stop::Breakpoint => {
                    let place = host.place()?;
                    if self.arrives(&place, target)? {
                        self.land(host, place)?;
                        // What the position is compared with is what was recorded.
                        (self.now.branches, self.now.landed) = (target.within, Some(target));
                        self.now.last = target;
                        self.stats.landed += 1;
                        return Ok(Exit::Reached);
                    }
                    self.pass(host, ram, window, place)?
                }
                Stop::Exit(exit @ (Exit::InterruptWindow | Exit::Shutdown)) => return Ok(exit),
                // It halts still, and time is to be moved first.
                Stop::Exit(Exit::Halted) if self.now.exits == target.count => return Ok(Exit::Halted),
                // The target comes before this exit.
                Stop::Exit(_) if self.minds(Trap::Lost) => return Err(self.overshot(target)),
                Stop::Exit(exit) => return Ok(exit),
                _ => self.approach(host, ram, window, target)?,
            };
        }
    }

    /// A step towards the target, by counter or breakpoint.
    fn approach<H: Steered>(
        &mut self,
        host: &mut H,
        ram: &mut Ram,
        window: bool,
        target: Position,
    ) -> Result<Stop, VcpuError> {
        match policy::next(self.now.branches, target.within, self.margin.ticks()) {
            Step::Overshot if self.minds(Trap::Late) => Err(self.overshot(target)),
            Step::RunFree(ticks) => {
                host.counter().arm(ticks)?;
                let stop = self.go(host, ram, Go { window, ..Go::default() });
                host.counter().disarm()?;
                if !self.minds(Trap::Early) && matches!(stop, Ok(Stop::Signal)) {
                    // As if the signal said where the guest is.
                    self.offset = self
                        .offset
                        .wrapping_add(target.within - self.margin.ticks())
                        .wrapping_sub(self.now.branches);
                }
                stop
            }
            _ => self.go(host, ram, Go { breakpoint: Some(target.rip), window, ..Go::default() }),
        }
    }

    /// At the target's RIP: is this the arrival?
    fn arrives(&self, place: &Place, target: Position) -> Result<bool, VcpuError> {
        if self.now.branches < target.within && self.minds(Trap::EarlierArrivals) {
            return Ok(false);
        }
        if self.now.branches > target.within && self.minds(Trap::Late) {
            return Err(self.overshot(target));
        }
        if place.registers != target.registers && self.minds(Trap::Miscount) {
            return Err(self.elsewhere(place.rip, "the registers are"));
        }
        Ok(true)
    }

    /// Passes the breakpoint at which the guest stands.
    fn pass<H: Steered>(
        &mut self,
        host: &mut H,
        ram: &mut Ram,
        window: bool,
        place: Place,
    ) -> Result<Stop, VcpuError> {
        self.stats.passed += 1;
        let before = self.now.branches;
        let go = Go { breakpoint: Some(place.rip), resume: true, step: false, window };
        let stop = self.go(host, ram, go)?;
        let again = stop == Stop::Breakpoint && self.now.branches == before && host.place()? == place;
        if !again || !self.minds(Trap::IgnoredResumeFlag) {
            return Ok(stop);
        }
        // A fault of the step would push TF. A branch faults on nothing but its fetch (and a wild target).
        let fetched = anchor::decode(&mut |at, bytes| host.code(ram, at, bytes), place.rip).is_some();
        if (!fetched || place.debugs_itself) && self.minds(Trap::LeakingTrapFlag) {
            return Err(LandingError::Stuck { rip: place.rip }.into());
        }
        self.go(host, ram, Go { breakpoint: None, resume: false, step: true, window })
    }
}
