//! Where a machine's inputs come from, and who is told what it does.
//!
//! [`Source`] is what the guest loop knows. [`Live`] takes inputs from the outside as they come; a recorder does
//! the same and appends each to the log before it hands it on; a replayer takes them from the log.

use std::collections::VecDeque;

use entry::{Answer, DiskRequest, End, Input, Output, Position, PositionUnit, Question};

use crate::machine::{Machine, StateDigest};

/// What the loop does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Apply this input here.
    Apply(Input),
    /// Run, at most to here.
    Run {
        /// `None`: until something happens.
        until: Option<Position>,
    },
    /// Take a digest here and tell it to [`Source::digest`].
    Digest,
    /// Give control back to the loop's owner; the machine is at a whole boundary.
    Pause,
}

/// After the guest's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Reset the machine and go on.
    Reset,
    /// The run is over.
    Finish,
    /// The run is over, and a digest of the machine's last state is told to [`Source::digest`].
    FinishWithDigest,
}

/// Where inputs come from. The loop calls it with the machine at a whole boundary.
pub trait Source {
    /// What makes a run impossible to go on with.
    type Error: std::error::Error;

    /// What to do at the machine's position. A halted guest that is run skips to its next deadline, so a source that
    /// paces waits here until that is due. At one position inputs come before running on, so whatever else is done
    /// while the guest is halted needs an [`Input::Clock`] before it that says how far time has moved there.
    fn next(&mut self, machine: &Machine) -> Result<Next, Self::Error>;

    /// Somebody kicked, and the guest is not at a position: `at` is the last. `false`: pause all the same.
    fn between(&mut self, _at: Position) -> Result<bool, Self::Error> {
        Ok(true)
    }

    /// Check words of the synchronous exits up to `at` since the last call, before all else that is told of them.
    fn exits(&mut self, _at: Position, _checks: &[u16]) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The guest asks. `None`: there is no answer here; the question stays, and the loop pauses.
    fn answer(&mut self, at: Position, question: &Question) -> Result<Option<Answer>, Self::Error>;

    /// Something leaves the machine.
    fn output(&mut self, at: Position, output: Output) -> Result<(), Self::Error>;

    /// The guest asks something of a disk.
    fn disk(&mut self, at: Position, request: DiskRequest) -> Result<(), Self::Error>;

    /// The digest that [`Next::Digest`] asked for.
    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), Self::Error>;

    /// The guest's run, or the boot that it was in, is over.
    fn ended(&mut self, at: Position, end: End) -> Result<After, Self::Error>;
}

/// The world around a live machine: its tap, disks, consoles and clock. Where the I/O is.
pub trait Outside {
    /// A failure of the host.
    type Error: std::error::Error;

    /// The next input that waits and that the machine `takes`.
    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Self::Error>;

    /// Somebody asked the run to stop.
    fn stop_requested(&mut self) -> bool;

    /// Where the host's clock says guest time should be, in ns. `None`: guest time is virtual and idle time is skipped.
    fn time_ns(&mut self) -> Option<u64>;

    /// Sleeps until an input may wait, until [`Outside::time_ns`] is `until_ns`, or for a shorter while.
    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Self::Error>;

    /// Something waits for the guest's next position, which has not come yet; `at` is the last. Called at each kick, so that
    /// a guest that starves its inputs is noticed.
    fn starving(&mut self, _at: Position) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Answers a question that the guest asks at a position.
    fn answer(&mut self, at: Position, question: &Question) -> Result<Answer, Self::Error>;

    /// Takes what leaves the machine, to be sent as soon as it may: at once, or when a gate lets it.
    fn send(&mut self, output: Output) -> Result<(), Self::Error>;

    /// Starts a request to a disk, whose completion comes as an input. Requests that overlap run in order.
    fn disk(&mut self, request: DiskRequest) -> Result<(), Self::Error>;

    /// A digest that was asked for.
    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), Self::Error>;
}

/// How far the time of a busy guest may fall behind the host's clock before it is raised to a tick that is due; twice as
/// far when none is. A raise costs the log ten bytes, and a tick needs one anyway.
pub const LAG_MAX_NS: u64 = 5_000_000;
/// How far a busy guest runs before the host's clock is looked at again, in each unit of positions.
const fn per_look(unit: PositionUnit) -> u64 {
    match unit {
        PositionUnit::Instructions => 250_000,
        // Their count is that of exits.
        PositionUnit::Branches | PositionUnit::SynchronousExits | PositionUnit::Steps => 64,
    }
}

/// Stops and digests asked for, by position, ascending.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    /// Take a digest at each of these.
    pub digests: VecDeque<Position>,
    /// Pause here.
    pub pause: Option<Position>,
}

impl Stops {
    /// What is asked for at a position.
    fn due(&mut self, at: Position) -> Option<Next> {
        if self.digests.front().is_some_and(|due| *due <= at) {
            self.digests.pop_front();
            return Some(Next::Digest);
        }
        self.pause.is_some_and(|due| due <= at).then_some(Next::Pause)
    }

    fn next(&self) -> Option<Position> {
        self.digests.front().copied().into_iter().chain(self.pause).min()
    }
}

/// The outside as a source: inputs are applied as they come and nothing is kept.
pub struct Live<O> {
    outside: O,
    unit: PositionUnit,
    stops: Stops,
    /// What follows the clock's input that announces it.
    announced: Option<Input>,
    /// The clock was raised and the guest has not run since, so that it takes its tick before the next.
    raised: bool,
}

impl<O: Outside> Live<O> {
    /// Inputs from `outside` for a machine whose positions are in `unit`.
    pub fn new(outside: O, unit: PositionUnit, stops: Stops) -> Live<O> {
        Live { outside, unit, stops, announced: None, raised: false }
    }

    /// Moves the position at which the loop pauses.
    pub fn pause_at(&mut self, at: Option<Position>) {
        self.stops.pause = at;
    }

    /// What positions count.
    pub fn unit(&self) -> PositionUnit {
        self.unit
    }

    /// The outside.
    pub fn outside(&mut self) -> &mut O {
        &mut self.outside
    }

    /// An input that waits, or the reading of the clock that has to go before it.
    fn input(&mut self, machine: &Machine) -> Result<Option<Input>, O::Error> {
        if let Some(input) = self.announced.take() {
            return Ok(Some(input));
        }
        let Some(input) = self.outside.poll(&mut |input| machine.takes(input))? else { return Ok(None) };
        // An input that ends an idle wait says when: nothing else tells how far time had moved at this position.
        if machine.is_halted() {
            self.announced = Some(input);
            let time_ns = self.outside.time_ns().map_or(0, |time_ns| up_to_deadline(machine, time_ns));
            return Ok(Some(Input::Clock { time_ns: time_ns.max(machine.time_ns()) }));
        }
        Ok(Some(input))
    }

    /// How far to run a busy guest.
    fn run_until(&self, machine: &Machine) -> Option<Position> {
        let look = Position::exact(machine.position().count + per_look(self.unit));
        Some(self.stops.next().map_or(look, |stop| stop.min(look)))
    }
}

/// A reading of the host's clock that does not skip a tick: a guest that is behind sees its ticks one by one.
fn up_to_deadline(machine: &Machine, time_ns: u64) -> u64 {
    machine.deadline_ns().map_or(time_ns, |deadline| time_ns.min(deadline))
}

impl<O: Outside> Source for Live<O> {
    type Error = O::Error;

    fn next(&mut self, machine: &Machine) -> Result<Next, O::Error> {
        loop {
            if let Some(due) = self.stops.due(machine.position()) {
                return Ok(due);
            }
            if self.outside.stop_requested() {
                return Ok(Next::Pause);
            }
            if let Some(input) = self.input(machine)? {
                return Ok(Next::Apply(input));
            }
            let deadline = machine.deadline_ns();
            let time_ns = self.outside.time_ns();
            if machine.is_halted() {
                match (deadline, time_ns) {
                    (Some(_), None) => return Ok(Next::Run { until: self.run_until(machine) }),
                    (Some(deadline), Some(now)) if now >= deadline => {
                        return Ok(Next::Run { until: self.run_until(machine) });
                    }
                    // Nothing but an input or the deadline can go on with this guest.
                    _ => self.outside.wait(deadline)?,
                }
            } else {
                let due = |now: &u64| deadline.is_some_and(|deadline| *now >= deadline);
                let lag_max = |now: &u64| if due(now) { LAG_MAX_NS } else { 2 * LAG_MAX_NS };
                let behind = |now: &u64| *now > machine.time_ns().saturating_add(lag_max(now));
                if let Some(time_ns) = time_ns.filter(|now| behind(now) && !self.raised) {
                    self.raised = true;
                    return Ok(Next::Apply(Input::Clock { time_ns: up_to_deadline(machine, time_ns) }));
                }
                self.raised = false;
                return Ok(Next::Run { until: self.run_until(machine) });
            }
        }
    }

    fn between(&mut self, at: Position) -> Result<bool, O::Error> {
        self.outside.starving(at)?;
        Ok(!self.outside.stop_requested())
    }

    fn answer(&mut self, at: Position, question: &Question) -> Result<Option<Answer>, O::Error> {
        self.outside.answer(at, question).map(Some)
    }

    fn output(&mut self, _at: Position, output: Output) -> Result<(), O::Error> {
        self.outside.send(output)
    }

    fn disk(&mut self, _at: Position, request: DiskRequest) -> Result<(), O::Error> {
        self.outside.disk(request)
    }

    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), O::Error> {
        self.outside.digest(at, digest)
    }

    fn ended(&mut self, _at: Position, end: End) -> Result<After, O::Error> {
        Ok(if end == End::Reboot { After::Reset } else { After::Finish })
    }
}
