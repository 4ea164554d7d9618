//! The driver: keeps the position of an engine that counts branches, and lands it on others.

use std::cmp::Ordering;

use entry::Position;

use crate::ram::Ram;

use super::policy::{self, Margin, Step};
use super::{Exit, Go, LandingError, Place, Steered, Stop, Trap, VcpuError, anchor};
use crate::vcpu::Limit;

/// Tries to find a conditional branch before a kicked guest is let run to its next exit.
const TRIES: u32 = 64;
/// Branches after which a guest that did not come to the branch expected is looked at again.
const LOOK_AGAIN: u64 = 1000;

/// What happened so far, for reports. Not state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Kicked guests that were stopped at a branch.
    pub anchored: u64,
    /// Kicked guests that came to no branch and were stopped at their next exit.
    pub starved: u64,
    /// Positions landed on.
    pub landed: u64,
    /// Breakpoints that were no arrival yet.
    pub passed: u64,
}

/// See the module.
pub struct Lander {
    margin: Margin,
    /// Exits that the guest made by itself.
    exits: u64,
    /// Branches retired at the last stop.
    branches: u64,
    /// To be added to the counter.
    offset: u64,
    /// Nothing has run since the last of `exits` was completed.
    whole: bool,
    halted: bool,
    /// A kick was taken and not yet answered.
    owed: bool,
    /// The branch at which the guest was stopped last.
    landed: Option<Position>,
    stats: Stats,
    /// The trap that is left alone, to see what comes of it.
    #[cfg(test)]
    pub(super) without: Option<Trap>,
}

impl Lander {
    /// A lander for a counter that has shown this margin, at the start of a guest.
    pub fn new(margin: Margin) -> Lander {
        Lander {
            margin,
            exits: 0,
            branches: 0,
            offset: 0,
            whole: true,
            halted: false,
            owed: false,
            landed: None,
            stats: Stats::default(),
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

    /// Where the guest is. Away from branches and exits that is a count only, which orders before the branch ahead.
    pub fn position(&self) -> Position {
        match self.landed {
            Some(at) if (at.count, at.within) == (self.exits, self.branches) => at,
            _ => self.here(0, 0),
        }
    }

    fn here(&self, rip: u64, registers: u64) -> Position {
        Position { count: self.exits, within: self.branches, rip, registers }
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The margin.
    pub fn margin(&self) -> Margin {
        self.margin
    }

    /// Changes the margin, before another try.
    pub fn set_margin(&mut self, margin: Margin) {
        self.margin = margin;
    }

    /// The access that the guest left for is done.
    pub fn completed<H: Steered>(&mut self, host: &mut H) -> Result<(), VcpuError> {
        self.look(host)?;
        self.exits += 1;
        self.whole = true;
        Ok(())
    }

    /// An interrupt was injected: the guest is at a whole boundary no more.
    pub fn injected(&mut self) {
        self.whole = false;
        self.halted = false;
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
        (self.exits, self.whole, self.halted) = (at.count, at.rip == 0, halted);
        self.landed = (at.rip != 0).then_some(at);
        Ok(())
    }

    /// Runs the guest as [`crate::vcpu::Vcpu::run`] does.
    ///
    /// # Errors
    /// [`VcpuError::Overshot`] when the target was missed: restore an earlier state, widen the margin, try again.
    pub fn run<H: Steered>(&mut self, host: &mut H, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError> {
        let Some(until) = limit.until.filter(|until| until.count <= self.exits) else {
            return self.run_free(host, ram, limit);
        };
        match (until.count, until.within).cmp(&(self.exits, self.branches)) {
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
        LandingError::Elsewhere { branches: self.branches, rip, what }.into()
    }

    fn look<H: Steered>(&mut self, host: &mut H) -> Result<(), VcpuError> {
        self.branches = host.counter().read()?.wrapping_add(self.offset);
        Ok(())
    }

    /// Lets the guest go, and takes down what came of it.
    fn go<H: Steered>(&mut self, host: &mut H, ram: &mut Ram, go: Go) -> Result<Stop, VcpuError> {
        let stop = host.go(ram, go)?;
        self.look(host)?;
        match stop {
            // A guest that still halts has not left once more.
            Stop::Exit(Exit::Halted) if self.halted => {}
            Stop::Exit(Exit::Halted) => {
                self.exits += 1;
                (self.halted, self.whole) = (true, true);
            }
            Stop::Kicked => {
                self.owed = true;
                self.whole &= self.halted;
            }
            _ => self.whole &= self.halted,
        }
        Ok(stop)
    }

    fn run_free<H: Steered>(
        &mut self,
        host: &mut H,
        ram: &mut Ram,
        limit: &Limit,
    ) -> Result<Exit, VcpuError> {
        let mut tries = 0;
        loop {
            if self.owed && self.whole {
                self.owed = false;
                return Ok(Exit::Kicked);
            }
            if self.owed && tries < TRIES {
                tries += 1;
                if let Some(exit) = self.settle(host, ram, limit)? {
                    return Ok(exit);
                }
                self.stats.starved += u64::from(tries == TRIES);
                continue;
            }
            match self.go(host, ram, Go { window: limit.interrupt_window, ..Go::default() })? {
                Stop::Exit(exit) => return Ok(self.left(exit)),
                Stop::Kicked => tries = 0,
                _ => {}
            }
        }
    }

    /// The guest left by itself while a kick may be owed.
    fn left(&mut self, exit: Exit) -> Exit {
        self.owed &= self.minds(Trap::OwedKick);
        exit
    }

    /// A kicked guest goes on to a place where it can be stopped for good. `None`: it did not come there.
    fn settle<H: Steered>(
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
        let last = self.landed.filter(|at| at.count == self.exits);
        let again = last.is_some_and(|at| at.within == self.branches) && self.minds(Trap::SameCount);
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
        self.landed = Some(self.here(place.rip, place.registers));
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
                        (self.branches, self.landed) = (target.within, Some(target));
                        self.stats.landed += 1;
                        return Ok(Exit::Reached);
                    }
                    self.pass(host, ram, window, place)?
                }
                Stop::Exit(exit @ (Exit::InterruptWindow | Exit::Shutdown)) => return Ok(exit),
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
        match policy::next(self.branches, target.within, self.margin.ticks()) {
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
                        .wrapping_sub(self.branches);
                }
                stop
            }
            _ => self.go(host, ram, Go { breakpoint: Some(target.rip), window, ..Go::default() }),
        }
    }

    /// At the target's RIP: is this the arrival?
    fn arrives(&self, place: &Place, target: Position) -> Result<bool, VcpuError> {
        if self.branches < target.within && self.minds(Trap::EarlierArrivals) {
            return Ok(false);
        }
        if self.branches > target.within && self.minds(Trap::Late) {
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
        let before = self.branches;
        let go = Go { breakpoint: Some(place.rip), resume: true, step: false, window };
        let stop = self.go(host, ram, go)?;
        let again = stop == Stop::Breakpoint && self.branches == before && host.place()? == place;
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
