//! Replaying: a source that takes the inputs from the log, and checks everything else against it.

use std::collections::VecDeque;

use entry::log::{DiskStatus, EndReason, Entry, LoggedInput, Record};
use entry::{Answer, DiskRequest, DiskResult, End, Input, Output, Position, Question};

use crate::machine::{Machine, StateDigest};
use crate::record::{disk_status, logged_output, logged_state};
use crate::source::{AfterEnd, Next, Source};

/// Number of records before a divergence that its report shows.
const RECORDS_SHOWN: usize = 16;

/// Where records come from.
pub trait Records {
    /// Why the next record cannot be read.
    type Error: std::error::Error;

    /// The next record, `None` at the end of the log.
    fn next(&mut self) -> Result<Option<Record>, Self::Error>;
}

/// The replaying side's own copies of the disks, and where the outputs of the replay go.
pub trait Standby {
    /// A failure of the host.
    type Error: std::error::Error;

    /// Starts a request to a disk.
    fn start(&mut self, request: DiskRequest) -> Result<(), Self::Error>;

    /// Waits for a request to complete; `None` if no such request was started.
    fn finish(&mut self, slot: u8, id: u64) -> Result<Option<DiskResult>, Self::Error>;

    /// Takes an output of the machine. The log has it too, unless it came after the end of the log.
    fn output(&mut self, output: Output) -> Result<(), Self::Error>;
}

/// The replay cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError<L: std::error::Error, D: std::error::Error> {
    /// The log cannot be read any further.
    #[error(transparent)]
    Log(L),
    /// One of this host's disks failed.
    #[error(transparent)]
    Standby(D),
    /// The machine did something other than what the log says.
    #[error(transparent)]
    Divergence(Box<Divergence>),
}

/// Replay and recording differ: a serious bug, faulty hardware, or a damaged log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// Position of the machine.
    pub position: Position,
    /// What differs.
    pub what: Difference,
    /// The record that does not match, if there is one.
    pub expected: Option<Record>,
    /// The records before it, oldest first.
    pub before: Vec<Record>,
    /// Position of the last digest that was equal.
    pub equal_until: Option<Position>,
}

/// What differs between replay and log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Difference {
    #[error("the state's {} differ", .0.join(" and "))]
    State(Vec<&'static str>),
    #[error("guest time is {here} ns, the log has {logged} ns")]
    Time { logged: u64, here: u64 },
    #[error("the guest makes an output that is not in the log at this point: {0}")]
    Output(String),
    #[error("the guest asks a question that the log does not answer at this point: {0:?}")]
    Question(Question),
    #[error("disk {slot}, request {id}: the log has {logged:?}, this disk gives {here}")]
    Disk { slot: u8, id: u64, logged: DiskStatus, here: String },
    #[error("the guest ends ({0:?}), but in the log it does not end at this point")]
    End(End),
    #[error("the guest has ended, but the log goes on")]
    Over,
    #[error("the guest went past the position of the next record")]
    Past,
    #[error("the guest waits for an interrupt that will never come, but the log goes on")]
    Stuck,
    #[error("an exit of the guest differs: its check word is {here:#06x}, the log has {logged:#06x}")]
    Exit { logged: u16, here: u16 },
    #[error("the guest makes an exit that is not in the log")]
    ExtraExit,
    #[error("the log has a record of a kind that a replay cannot apply")]
    Unsupported,
}

impl std::fmt::Display for Divergence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "divergence at position {}: {}", self.position.count, self.what)?;
        if let Some(at) = self.equal_until {
            write!(f, "; the last state that was equal was at position {}", at.count)?;
        }
        if let Some(record) = &self.expected {
            write!(f, "\n  the log has: {record}")?;
        }
        for record in &self.before {
            write!(f, "\n  before it: {record}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Divergence {}

/// A source that takes its inputs from a log.
pub struct Replayer<L, D> {
    records: L,
    standby: D,
    /// The next record, once it was needed.
    front: Option<Record>,
    /// There are no more records.
    done: bool,
    previous: VecDeque<Record>,
    equal_until: Option<Position>,
    applied: u64,
    ended: Option<EndReason>,
    /// The position at which to pause.
    pause: Option<Position>,
    /// Number of check words of the next record that were found equal.
    exits_equal: usize,
}

type ReplayErrorOf<L, D> = ReplayError<<L as Records>::Error, <D as Standby>::Error>;

impl<L: Records, D: Standby> Replayer<L, D> {
    /// Replays `records` with the disks of `standby`.
    pub fn new(records: L, standby: D) -> Replayer<L, D> {
        Replayer {
            records,
            standby,
            front: None,
            done: false,
            previous: VecDeque::new(),
            equal_until: None,
            applied: 0,
            ended: None,
            pause: None,
            exits_equal: 0,
        }
    }

    /// Pauses at this position, besides the end of the log.
    pub fn pause_at(&mut self, at: Option<Position>) {
        self.pause = at;
    }

    /// Whether the end of the log was reached.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// How the log ended, once [`Replayer::is_done`]. `None`: the log was cut off.
    pub fn ended(&self) -> Option<EndReason> {
        self.ended
    }

    /// Number of records that were replayed.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Position of the last state that was equal to the log's.
    pub fn equal_until(&self) -> Option<Position> {
        self.equal_until
    }

    /// The source of the records.
    pub fn records(&self) -> &L {
        &self.records
    }

    /// The disks and outputs, for the source that goes on where the log has ended.
    pub fn into_standby(self) -> D {
        self.standby
    }

    /// Waits for the next record; `None` at the end of the log. It is not fetched before it is needed: a backup must not wait
    /// for the record after an output while it has not passed on the output.
    fn front(&mut self) -> Result<Option<&Record>, ReplayErrorOf<L, D>> {
        if self.front.is_none() && !self.done {
            self.front = self.records.next().map_err(ReplayError::Log)?;
            self.done = self.front.is_none();
        }
        Ok(self.front.as_ref())
    }

    /// Goes on to the record after the next one.
    fn advance(&mut self) {
        if let Some(done) = self.front.take() {
            self.applied += 1;
            if self.previous.len() == RECORDS_SHOWN {
                self.previous.pop_front();
            }
            self.previous.push_back(done);
        }
    }

    fn diverge<T>(&self, position: Position, what: Difference) -> Result<T, ReplayErrorOf<L, D>> {
        Err(ReplayError::Divergence(Box::new(Divergence {
            position,
            what,
            expected: self.front.clone(),
            before: self.previous.iter().cloned().collect(),
            equal_until: self.equal_until,
        })))
    }

    /// Checks that the log has no records after the end of the run.
    fn check_log_is_over(&mut self, at: Position) -> Result<(), ReplayErrorOf<L, D>> {
        if self.front()?.is_some() { self.diverge(at, Difference::Over) } else { Ok(()) }
    }

    fn input(&mut self, at: Position, input: LoggedInput) -> Result<Input, ReplayErrorOf<L, D>> {
        let input = match input {
            LoggedInput::Frame { slot, bytes } => Input::Frame { slot, bytes },
            LoggedInput::Console { console, bytes } => Input::Console { console, bytes },
            LoggedInput::Clock { time_ns } => Input::Clock { time_ns },
            LoggedInput::DiskDone { slot, id, status } => {
                let result = self.standby.finish(slot, id).map_err(ReplayError::Standby)?;
                let here = result.as_ref().map(disk_status);
                match result {
                    Some(result) if here == Some(status) => Input::DiskDone { slot, id, result },
                    _ => {
                        let here =
                            here.map_or("nothing: there is no such request".into(), |s| format!("{s:?}"));
                        return self.diverge(at, Difference::Disk { slot, id, logged: status, here });
                    }
                }
            }
        };
        self.advance();
        Ok(input)
    }

    /// How far to run for the next record, `front`, to become due. Outputs and questions come from running: those of the
    /// present position from an instruction or a timer that is still to come.
    fn run_until(&self, at: Position, front: &Record) -> Position {
        let due = front.position;
        let until = match front.entry {
            Entry::Answer(_) => Position::exact(due.count + 1),
            // Each exit is compared before the next one is made.
            Entry::Exits(_) => Position::exact(at.count + 1),
            Entry::Output(_) | Entry::End(EndReason::Guest(_)) if at >= due => Position::exact(due.count + 1),
            _ => due,
        };
        self.pause.map_or(until, |pause| pause.min(until))
    }
}

impl<L: Records, D: Standby> Source for Replayer<L, D> {
    type Error = ReplayErrorOf<L, D>;

    fn next(&mut self, machine: &Machine) -> Result<Next, Self::Error> {
        let at = machine.position();
        loop {
            if self.pause.is_some_and(|pause| at >= pause) {
                return Ok(Next::Pause);
            }
            let Some(front) = self.front()?.cloned() else { return Ok(Next::Pause) };
            if at > front.position {
                return self.diverge(at, Difference::Past);
            }
            if at < front.position {
                if machine.is_halted() && machine.deadline_ns().is_none() {
                    return self.diverge(at, Difference::Stuck);
                }
                return Ok(Next::Run { until: Some(self.run_until(at, &front)) });
            }
            match front.entry {
                Entry::State(_) => return Ok(Next::Digest),
                _ if self.ended.is_some() => return self.diverge(at, Difference::Over),
                Entry::Input(input) => return self.input(at, input).map(Next::Apply),
                Entry::Mark { time_ns } if time_ns == machine.time_ns() => self.advance(),
                // The time of a guest that is halted with interrupts off moves from deadline to deadline at one position.
                Entry::Mark { time_ns } if machine.is_halted() && machine.time_ns() < time_ns => {
                    return Ok(Next::Run { until: Some(Position::exact(at.count + 1)) });
                }
                Entry::Mark { time_ns } => {
                    return self.diverge(at, Difference::Time { logged: time_ns, here: machine.time_ns() });
                }
                Entry::End(EndReason::Stopped) => {
                    self.ended = Some(EndReason::Stopped);
                    self.advance();
                }
                Entry::Interrupt { .. } | Entry::Exits(_) => {
                    return self.diverge(at, Difference::Unsupported);
                }
                Entry::Output(_) | Entry::Answer(_) | Entry::End(EndReason::Guest(_)) => {
                    return Ok(Next::Run { until: Some(self.run_until(at, &front)) });
                }
            }
        }
    }

    fn exits(&mut self, at: Position, checks: &[u16]) -> Result<(), Self::Error> {
        let first = at.count - checks.len() as u64;
        for (n, &here) in (1..).zip(checks) {
            let at = Position::exact(first + n);
            let equal = self.exits_equal;
            let Some(Record { entry: Entry::Exits(words), .. }) = self.front()? else {
                return self.diverge(at, Difference::ExtraExit);
            };
            let (logged, len) = (words[equal], words.len());
            if logged != here {
                return self.diverge(at, Difference::Exit { logged, here });
            }
            self.exits_equal += 1;
            if self.exits_equal == len {
                self.exits_equal = 0;
                self.advance();
            }
        }
        Ok(())
    }

    fn answer(&mut self, at: Position, question: &Question) -> Result<Option<Answer>, Self::Error> {
        match self.front()? {
            Some(Record { position, entry: Entry::Answer(answer) }) if *position == at => {
                let answer = answer.clone();
                self.advance();
                Ok(Some(answer))
            }
            // The log is over: the source that goes on from here answers.
            None => Ok(None),
            _ => self.diverge(at, Difference::Question(question.clone())),
        }
    }

    fn output(&mut self, at: Position, output: Output) -> Result<(), Self::Error> {
        let here = logged_output(&output);
        match self.front()? {
            Some(Record { position, entry: Entry::Output(logged) }) if *position == at && *logged == here => {
                self.advance();
            }
            None => {}
            _ => {
                let here = Record { position: at, entry: Entry::Output(here) };
                return self.diverge(at, Difference::Output(here.to_string()));
            }
        }
        self.standby.output(output).map_err(ReplayError::Standby)
    }

    fn disk(&mut self, _at: Position, request: DiskRequest) -> Result<(), Self::Error> {
        self.standby.start(request).map_err(ReplayError::Standby)
    }

    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), Self::Error> {
        let here = logged_state(&digest);
        let Some(Record { entry: Entry::State(logged), .. }) = &self.front else { return Ok(()) };
        let parts = [
            ("vCPU", here.vcpu != logged.vcpu),
            ("devices", here.devices != logged.devices),
            ("RAM", here.ram != logged.ram),
        ];
        let differing: Vec<_> =
            parts.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect();
        if !differing.is_empty() {
            return self.diverge(at, Difference::State(differing));
        }
        self.equal_until = Some(at);
        self.advance();
        if self.ended.is_some() { self.check_log_is_over(at) } else { Ok(()) }
    }

    /// An end of the guest after the end of the log is left to the caller, which finds the replay done.
    fn ended(&mut self, at: Position, end: End) -> Result<AfterEnd, Self::Error> {
        match self.front()? {
            Some(Record { position, entry: Entry::End(EndReason::Guest(logged)) })
                if *position == at && *logged == end =>
            {
                self.advance();
                if end == End::Reboot {
                    return Ok(AfterEnd::Reset);
                }
                self.ended = Some(EndReason::Guest(end));
                match self.front()? {
                    Some(Record { position, entry: Entry::State(_) }) if *position == at => {
                        Ok(AfterEnd::FinishWithDigest)
                    }
                    _ => self.check_log_is_over(at).map(|()| AfterEnd::Finish),
                }
            }
            None => Ok(AfterEnd::Finish),
            _ => self.diverge(at, Difference::End(end)),
        }
    }
}
