//! Replaying: a source that takes the inputs from the log, and checks everything that the log says of the rest.

use std::collections::VecDeque;

use entry::log::{DiskStatus, EndReason, Entry, LoggedInput, Record};
use entry::{Answer, DiskRequest, DiskResult, End, Input, Output, Position, Question};

use crate::machine::{Machine, StateDigest};
use crate::record::{disk_status, logged_output, logged_state};
use crate::source::{After, Next, Source};

/// How many records before a divergence are kept for its report.
const CONTEXT: usize = 16;

/// Where records come from.
pub trait Records {
    /// Why there are no more.
    type Error: std::error::Error;

    /// The next record, `None` at the end of the log.
    fn next(&mut self) -> Result<Option<Record>, Self::Error>;
}

/// The replaying side's own copies of the disks, and where its outputs go.
pub trait Standby {
    /// A failure of the host.
    type Error: std::error::Error;

    /// Starts a request.
    fn start(&mut self, request: DiskRequest) -> Result<(), Self::Error>;

    /// Waits for a request that was started; `None` when there was none.
    fn finish(&mut self, slot: u8, id: u64) -> Result<Option<DiskResult>, Self::Error>;

    /// Takes what left the machine: what the log has, too, and behind its end what it has not.
    fn output(&mut self, output: Output) -> Result<(), Self::Error>;
}

/// The replay cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError<L: std::error::Error, D: std::error::Error> {
    /// The log cannot be read on.
    #[error(transparent)]
    Log(L),
    /// This host failed: a disk of its.
    #[error(transparent)]
    Standby(D),
    /// The machine does not do what the log says.
    #[error(transparent)]
    Divergence(Box<Divergence>),
}

/// Replay and recording differ. The worst bug there is, or a damaged log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// Where the machine is.
    pub position: Position,
    /// What differs.
    pub what: Difference,
    /// The record that does not fit, if there is one.
    pub expected: Option<Record>,
    /// The records before it, the last one last.
    pub before: Vec<Record>,
    /// The last digest that was equal.
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
    #[error("an output leaves that the log has not here: {0}")]
    Output(String),
    #[error("the guest asks what the log does not answer here: {0:?}")]
    Question(Question),
    #[error("disk {slot}, request {id}: the log has {logged:?}, this disk gives {here}")]
    Disk { slot: u8, id: u64, logged: DiskStatus, here: String },
    #[error("the guest ends by {0:?}")]
    End(End),
    #[error("the run is over, but the log goes on")]
    Over,
    #[error("the guest went past the position of the next record")]
    Past,
    #[error("the guest waits for ever, but the log goes on")]
    Stuck,
    #[error("an exit of the guest differs: its check word is {here:#06x}, the log has {logged:#06x}")]
    Exit { logged: u16, here: u16 },
    #[error("the guest leaves where the log has no exit")]
    ExtraExit,
    #[error("the log has a record that replay cannot apply")]
    Unsupported,
}

impl std::fmt::Display for Divergence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "divergence at position {}: {}", self.position.count, self.what)?;
        if let Some(at) = self.equal_until {
            write!(f, "; the state was equal at {}", at.count)?;
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

/// The log as a source.
pub struct Replayer<L, D> {
    records: L,
    standby: D,
    /// The record that comes next, once it was needed.
    front: Option<Record>,
    /// There are no more records.
    done: bool,
    before: VecDeque<Record>,
    equal_until: Option<Position>,
    applied: u64,
    ended: Option<EndReason>,
    /// Pause here.
    pause: Option<Position>,
    /// How many check words of the record in front were found equal.
    exits_equal: usize,
}

type Failure<L, D> = ReplayError<<L as Records>::Error, <D as Standby>::Error>;

impl<L: Records, D: Standby> Replayer<L, D> {
    /// Replays `records` with the disks of `standby`.
    pub fn new(records: L, standby: D) -> Replayer<L, D> {
        Replayer {
            records,
            standby,
            front: None,
            done: false,
            before: VecDeque::new(),
            equal_until: None,
            applied: 0,
            ended: None,
            pause: None,
            exits_equal: 0,
        }
    }

    /// Pauses at this position too.
    pub fn pause_at(&mut self, at: Option<Position>) {
        self.pause = at;
    }

    /// The log's end was reached.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// How the log ended, once [`Replayer::is_done`]. `None`: it was cut off.
    pub fn ended(&self) -> Option<EndReason> {
        self.ended
    }

    /// Records that were replayed.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Position of the last state that was found equal.
    pub fn equal_until(&self) -> Option<Position> {
        self.equal_until
    }

    /// The source of the records.
    pub fn records(&self) -> &L {
        &self.records
    }

    /// The host's side of the replay, for who goes on where the log has ended.
    pub fn into_standby(self) -> D {
        self.standby
    }

    /// The record that comes next: waits for it, `None` at the log's end. It is looked for when it is needed and not
    /// before: a backup may not wait for what is behind an output while it has not yet told of the output.
    fn front(&mut self) -> Result<Option<&Record>, Failure<L, D>> {
        if self.front.is_none() && !self.done {
            self.front = self.records.next().map_err(ReplayError::Log)?;
            self.done = self.front.is_none();
        }
        Ok(self.front.as_ref())
    }

    /// The record in front is dealt with.
    fn advance(&mut self) {
        if let Some(done) = self.front.take() {
            self.applied += 1;
            if self.before.len() == CONTEXT {
                self.before.pop_front();
            }
            self.before.push_back(done);
        }
    }

    fn diverge<T>(&self, position: Position, what: Difference) -> Result<T, Failure<L, D>> {
        Err(ReplayError::Divergence(Box::new(Divergence {
            position,
            what,
            expected: self.front.clone(),
            before: self.before.iter().cloned().collect(),
            equal_until: self.equal_until,
        })))
    }

    /// Behind the end of the run there is nothing.
    fn check_over(&mut self, at: Position) -> Result<(), Failure<L, D>> {
        if self.front()?.is_some() { self.diverge(at, Difference::Over) } else { Ok(()) }
    }

    fn input(&mut self, at: Position, input: LoggedInput) -> Result<Input, Failure<L, D>> {
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

    /// How far to run for the record in front to become due. Outputs and answers are made by running: those of the
    /// present position by an instruction, or a timer, that is still to come.
    fn run_until(&self, at: Position, front: &Record) -> Position {
        let due = front.position;
        let until = match front.entry {
            Entry::Answer(_) => Position::exact(due.count + 1),
            // Each is compared before the next.
            Entry::Exits(_) => Position::exact(at.count + 1),
            Entry::Output(_) | Entry::End(EndReason::Guest(_)) if at >= due => Position::exact(due.count + 1),
            _ => due,
        };
        self.pause.map_or(until, |pause| pause.min(until))
    }
}

impl<L: Records, D: Standby> Source for Replayer<L, D> {
    type Error = Failure<L, D>;

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
                // Halted with interrupts off, a guest lets deadlines pass where it is.
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
            // Who goes on from here answers it.
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
        if self.ended.is_some() { self.check_over(at) } else { Ok(()) }
    }

    /// An end that the log has not got to any more is the caller's: it finds the replay done.
    fn ended(&mut self, at: Position, end: End) -> Result<After, Self::Error> {
        match self.front()? {
            Some(Record { position, entry: Entry::End(EndReason::Guest(logged)) })
                if *position == at && *logged == end =>
            {
                self.advance();
                if end == End::Reboot {
                    return Ok(After::Reset);
                }
                self.ended = Some(EndReason::Guest(end));
                match self.front()? {
                    Some(Record { position, entry: Entry::State(_) }) if *position == at => {
                        Ok(After::FinishWithDigest)
                    }
                    _ => self.check_over(at).map(|()| After::Finish),
                }
            }
            None => Ok(After::Finish),
            _ => self.diverge(at, Difference::End(end)),
        }
    }
}
