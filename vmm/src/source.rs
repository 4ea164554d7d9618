//! Where a machine's inputs come from and where its outputs go.
//!
//! The guest loop knows a [`Source`] only. [`Live`] takes inputs from the outside as they come; a recorder does the same
//! and appends each to the log before it passes it on; a replayer takes them from the log.

use std::collections::VecDeque;

use entry::{Answer, DiskRequest, End, Input, Output, Position, PositionUnit, Question};

use crate::machine::{Machine, StateDigest};

/// What the loop has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Apply this input at the present position.
    Apply(Input),
    /// Run the guest, at most to a position.
    Run {
        /// The position; `None`: until something happens.
        until: Option<Position>,
    },
    /// Take a digest here and pass it to [`Source::digest`].
    Digest,
    /// Give control back to the owner of the loop. The machine is at an instruction boundary.
    Pause,
}

/// What follows the guest's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterEnd {
    /// Reset the machine and go on.
    Reset,
    /// The run is over.
    Finish,
    /// The run is over, after a digest of the machine's last state was passed to [`Source::digest`].
    FinishWithDigest,
}

/// Where inputs come from. The loop calls it with the machine at an instruction boundary.
pub trait Source {
    /// Why a run cannot go on.
    type Error: std::error::Error;

    /// What to do at the machine's position. A halted guest skips to its next deadline when it is run, so a source that
    /// follows the host's clock waits here until the deadline is due. A replay applies all inputs of a position before it
    /// runs on, so any other input of a halted guest needs an [`Input::Clock`] before it, which says how far time has
    /// moved at that position.
    fn next(&mut self, machine: &Machine) -> Result<Next, Self::Error>;

    /// The guest was kicked where the engine has no position; `at` is its last one. Returns `false` to pause there anyway.
    fn kicked_between_positions(&mut self, _at: Position) -> Result<bool, Self::Error> {
        Ok(true)
    }

    /// Check words of the synchronous exits since the last call, up to `at`. Called before anything else that these exits led to
    /// is reported.
    fn exits(&mut self, _at: Position, _checks: &[u16]) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Answers a question of the guest. `None`: this source has no answer; the question stays open, and the loop pauses.
    fn answer(&mut self, at: Position, question: &Question) -> Result<Option<Answer>, Self::Error>;

    /// An output leaves the machine.
    fn output(&mut self, at: Position, output: Output) -> Result<(), Self::Error>;

    /// The guest makes a request to a disk.
    fn disk(&mut self, at: Position, request: DiskRequest) -> Result<(), Self::Error>;

    /// The digest that [`Next::Digest`] asked for.
    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), Self::Error>;

    /// The guest's run, or its present boot, is over.
    fn ended(&mut self, at: Position, end: End) -> Result<AfterEnd, Self::Error>;
}

/// The host's devices around a live machine: tap, disks, consoles and clock. All I/O is done here.
pub trait Outside {
    /// A failure of the host.
    type Error: std::error::Error;

    /// The next input that waits and that the machine `takes`.
    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Self::Error>;

    /// Whether the run was asked to stop.
    fn stop_requested(&mut self) -> bool;

    /// Guest time by the host's clock, in ns. `None`: guest time is virtual, and idle time is skipped.
    fn time_ns(&mut self) -> Option<u64>;

    /// Sleeps until an input may be waiting or [`Outside::time_ns`] is `until_ns`. May return earlier.
    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Self::Error>;

    /// An input waits for the guest's next position, which it has not reached yet; `at` is its last one. Called at each kick, so
    /// that a guest without positions, which starves its inputs, is noticed.
    fn starving(&mut self, _at: Position) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Answers a question that the guest asks at a position.
    fn answer(&mut self, at: Position, question: &Question) -> Result<Answer, Self::Error>;

    /// Takes an output of the machine, to be sent as soon as it may leave: at once, or when a gate releases it.
    fn send(&mut self, output: Output) -> Result<(), Self::Error>;

    /// Starts a request to a disk. Its completion comes as an input. Requests that overlap are done in order.
    fn disk(&mut self, request: DiskRequest) -> Result<(), Self::Error>;

    /// Takes a digest that was asked for by [`PlannedStops`].
    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), Self::Error>;
}

/// How far the time of a busy guest may fall behind the host's clock before it is raised, if a tick is due; twice as far if
/// none is. Raising the time costs ten bytes of log, and a tick that is due needs it anyway.
pub const CLOCK_LAG_MAX_NS: u64 = 5_000_000;
/// How far a busy guest runs before the host's clock is read again, in each unit of positions.
const fn clock_check_interval(unit: PositionUnit) -> u64 {
    match unit {
        PositionUnit::Instructions => 250_000,
        // These positions count exits or branches.
        PositionUnit::Branches | PositionUnit::SynchronousExits | PositionUnit::Steps => 64,
    }
}

/// Positions at which to take a digest or to pause.
#[derive(Clone, Debug, Default)]
pub struct PlannedStops {
    /// Take a digest at each of these; ascending.
    pub digests: VecDeque<Position>,
    /// Pause here.
    pub pause: Option<Position>,
}

impl PlannedStops {
    /// Takes what is to be done at a position, if anything is.
    fn take_due(&mut self, at: Position) -> Option<Next> {
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

/// The outside as a source: inputs are applied as they come, and nothing is recorded.
pub struct Live<O> {
    outside: O,
    unit: PositionUnit,
    stops: PlannedStops,
    /// The input that follows the [`Input::Clock`] that was returned last.
    announced: Option<Input>,
    /// Time was raised and the guest has not run since: it must take its tick before the next raise.
    raised: bool,
}

impl<O: Outside> Live<O> {
    /// Inputs from `outside` for a machine whose positions are in `unit`.
    pub fn new(outside: O, unit: PositionUnit, stops: PlannedStops) -> Live<O> {
        Live { outside, unit, stops, announced: None, raised: false }
    }

    /// Sets the position at which the loop pauses.
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

    /// An input that waits, or the reading of the clock that has to be applied before it.
    fn input(&mut self, machine: &Machine) -> Result<Option<Input>, O::Error> {
        if let Some(input) = self.announced.take() {
            return Ok(Some(input));
        }
        let Some(input) = self.outside.poll(&mut |input| machine.has_room_for(input))? else {
            return Ok(None);
        };
        // An input that ends an idle wait is preceded by the time: nothing else in the log says how far time had moved there.
        if machine.is_halted() {
            self.announced = Some(input);
            let time_ns = self.outside.time_ns().map_or(0, |time_ns| up_to_deadline(machine, time_ns));
            return Ok(Some(Input::Clock { time_ns: time_ns.max(machine.time_ns()) }));
        }
        Ok(Some(input))
    }

    /// The position at which a busy guest has to stop.
    fn run_until(&self, machine: &Machine) -> Option<Position> {
        let next_check = Position::exact(machine.position().count + clock_check_interval(self.unit));
        Some(self.stops.next().map_or(next_check, |stop| stop.min(next_check)))
    }
}

/// A reading of the host's clock, limited to the next tick: a guest whose time is behind gets its ticks one by one.
fn up_to_deadline(machine: &Machine, time_ns: u64) -> u64 {
    machine.deadline_ns().map_or(time_ns, |deadline| time_ns.min(deadline))
}

impl<O: Outside> Source for Live<O> {
    type Error = O::Error;

    fn next(&mut self, machine: &Machine) -> Result<Next, O::Error> {
        loop {
            if let Some(due) = self.stops.take_due(machine.position()) {
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
                    // Only an input or the deadline can make this guest go on.
                    _ => self.outside.wait(deadline)?,
                }
            } else {
                let due = |now: &u64| deadline.is_some_and(|deadline| *now >= deadline);
                let lag_max = |now: &u64| if due(now) { CLOCK_LAG_MAX_NS } else { 2 * CLOCK_LAG_MAX_NS };
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

    fn kicked_between_positions(&mut self, at: Position) -> Result<bool, O::Error> {
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

    fn ended(&mut self, _at: Position, end: End) -> Result<AfterEnd, O::Error> {
        Ok(if end == End::Reboot { AfterEnd::Reset } else { AfterEnd::Finish })
    }
}
