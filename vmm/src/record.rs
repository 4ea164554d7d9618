//! Recording: a live source that appends everything to the log before it takes effect.

use entry::codec::EXITS_MAX;
use entry::log::{DiskStatus, EndReason, Entry, LoggedInput, LoggedOutput, OutputTo, Record};
use entry::{Answer, Digest, DiskRequest, DiskResult, End, Input, Output, Position, PositionUnit, Question};
use twox_hash::XxHash3_128;

use crate::guest_loop::LoopError;
use crate::machine::{Machine, StateDigest};
use crate::source::{AfterEnd, Live, Next, Outside, Source};

/// About how many instructions a position counts for, in each unit of positions.
const fn instructions_per(unit: PositionUnit) -> u64 {
    match unit {
        PositionUnit::Instructions => 1,
        // These positions count exits or branches.
        PositionUnit::Branches | PositionUnit::SynchronousExits | PositionUnit::Steps => 1000,
    }
}

/// How often the recorder logs how far the machine is (a mark) and in which state (a digest).
#[derive(Clone, Copy, Debug)]
pub struct LogIntervals {
    /// The most instructions between two digests of the state.
    pub digest_instructions: u64,
    /// The most guest time between two digests, in ns, while the guest runs or takes ticks.
    pub digest_ns: u64,
    /// The most guest time between two marks, in ns, while the guest runs or takes ticks.
    pub mark_ns: u64,
}

impl LogIntervals {
    /// For a log that is stored in a file: nobody waits for its marks.
    pub const FILE: LogIntervals =
        LogIntervals { digest_instructions: 10_000_000, digest_ns: u64::MAX, mark_ns: 1_000_000_000 };
    /// For a backup: marks bound its lag, and it checks each digest soon after it was taken.
    pub const BACKUP: LogIntervals =
        LogIntervals { digest_instructions: u64::MAX, digest_ns: 90_000_000, mark_ns: 5_000_000 };
}

/// Where the recorder puts records: the log.
pub trait RecordSink {
    /// Why a record was not taken.
    type Error;

    /// Takes a record. It need not be on disk, or with the backup, when this returns: the gate waits for that.
    fn append(&mut self, record: &Record) -> Result<(), Self::Error>;

    /// Called at every turn of the loop, with the machine's position: to send what should not wait much longer, and to slow
    /// down a guest that is faster than its log.
    fn on_turn(&mut self, at: Position) -> Result<(), Self::Error>;
}

/// [`Live`] with a log: an input is appended first and applied second.
pub struct Recorder<O, L> {
    live: Live<O>,
    log: L,
    intervals: LogIntervals,
    next_digest: u64,
    next_digest_ns: u64,
    next_mark_ns: u64,
    /// The digest that was asked for last is for the log only, not for the outside.
    own_digest: bool,
    /// Check words of exits that are not in the log yet, and the position of the last one.
    exits: Vec<u16>,
    exits_at: Position,
}

impl<O: Outside, L: RecordSink<Error = O::Error>> Recorder<O, L> {
    /// Records the inputs and outputs of `live`.
    pub fn new(live: Live<O>, log: L, intervals: LogIntervals) -> Recorder<O, L> {
        Recorder {
            live,
            log,
            intervals,
            next_digest: 0,
            next_digest_ns: 0,
            next_mark_ns: 0,
            own_digest: false,
            exits: Vec::new(),
            exits_at: Position::default(),
        }
    }

    /// The source whose inputs are recorded.
    pub fn live(&mut self) -> &mut Live<O> {
        &mut self.live
    }

    /// The source, to go on without a log.
    pub fn into_live(self) -> Live<O> {
        self.live
    }

    /// The log.
    pub fn log(&mut self) -> &mut L {
        &mut self.log
    }

    /// Ends the log because the user stops the run here. Its last records are the machine's time, the end, and the state.
    ///
    /// # Errors
    /// Those of the log and of the machine.
    pub fn stop(&mut self, machine: &mut Machine) -> Result<(), LoopError<O::Error>> {
        let at = machine.position();
        let end = Entry::End(EndReason::Stopped);
        if machine.is_between_positions() {
            return self.append(at, end).map_err(LoopError::Source);
        }
        let state = logged_state(&machine.digest()?);
        let last = [Entry::Mark { time_ns: machine.time_ns() }, end, Entry::State(state)];
        last.into_iter().try_for_each(|entry| self.append(at, entry)).map_err(LoopError::Source)
    }

    /// Appends the machine's time and state: the other side goes on from here.
    ///
    /// # Errors
    /// Those of the log and of the machine.
    pub fn append_state(&mut self, machine: &mut Machine) -> Result<(), LoopError<O::Error>> {
        if machine.is_between_positions() {
            return Ok(());
        }
        let at = machine.position();
        let state = logged_state(&machine.digest()?);
        let noted = [Entry::Mark { time_ns: machine.time_ns() }, Entry::State(state)];
        noted.into_iter().try_for_each(|entry| self.append(at, entry)).map_err(LoopError::Source)
    }

    fn append(&mut self, position: Position, entry: Entry) -> Result<(), O::Error> {
        self.append_record(&Record { position, entry })
    }

    /// Appends a record, after the exits that came before it.
    fn append_record(&mut self, record: &Record) -> Result<(), O::Error> {
        self.append_exits()?;
        self.log.append(record)
    }

    /// Appends an input and returns it. Its bytes are lent to the log, not copied.
    fn append_input(&mut self, position: Position, mut input: Input) -> Result<Input, O::Error> {
        let record = Record { position, entry: Entry::Input(logged_input(&mut input)) };
        self.append_record(&record)?;
        if let Entry::Input(logged) = record.entry {
            give_back(&mut input, logged);
        }
        Ok(input)
    }

    /// Logs the exits that are not in the log yet.
    fn append_exits(&mut self) -> Result<(), O::Error> {
        if self.exits.is_empty() {
            return Ok(());
        }
        let entry = Entry::Exits(std::mem::take(&mut self.exits));
        self.log.append(&Record { position: self.exits_at, entry })
    }
}

impl<O: Outside, L: RecordSink<Error = O::Error>> Source for Recorder<O, L> {
    type Error = O::Error;

    fn next(&mut self, machine: &Machine) -> Result<Next, O::Error> {
        let at = machine.position();
        self.log.on_turn(at)?;
        let time_ns = machine.time_ns();
        let digest = at.count >= self.next_digest || time_ns >= self.next_digest_ns;
        // The time of a halted guest moves although its position does not: a mark before a digest there says how far.
        if time_ns >= self.next_mark_ns || digest && machine.is_halted() {
            self.next_mark_ns = time_ns.saturating_add(self.intervals.mark_ns);
            self.append(at, Entry::Mark { time_ns })?;
        }
        if digest {
            let instructions = self.intervals.digest_instructions / instructions_per(self.live.unit());
            self.next_digest = at.count.saturating_add(instructions);
            self.next_digest_ns = time_ns.saturating_add(self.intervals.digest_ns);
            self.own_digest = true;
            return Ok(Next::Digest);
        }
        match self.live.next(machine)? {
            Next::Apply(input) => self.append_input(at, input).map(Next::Apply),
            Next::Run { until } => {
                let digest = Position::exact(self.next_digest);
                Ok(Next::Run { until: Some(until.map_or(digest, |until| until.min(digest))) })
            }
            next => Ok(next),
        }
    }

    fn kicked_between_positions(&mut self, at: Position) -> Result<bool, O::Error> {
        self.live.kicked_between_positions(at)
    }

    fn exits(&mut self, at: Position, checks: &[u16]) -> Result<(), O::Error> {
        let first = at.count - checks.len() as u64;
        for (n, check) in (1..).zip(checks) {
            self.exits.push(*check);
            self.exits_at = Position::exact(first + n);
            if self.exits.len() == EXITS_MAX {
                self.append_exits()?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, at: Position, question: &Question) -> Result<Option<Answer>, O::Error> {
        let answer = self.live.answer(at, question)?;
        if let Some(answer) = &answer {
            self.append(at, Entry::Answer(answer.clone()))?;
        }
        Ok(answer)
    }

    fn output(&mut self, at: Position, output: Output) -> Result<(), O::Error> {
        self.append(at, Entry::Output(logged_output(&output)))?;
        self.live.output(at, output)
    }

    fn disk(&mut self, at: Position, request: DiskRequest) -> Result<(), O::Error> {
        self.live.disk(at, request)
    }

    fn digest(&mut self, at: Position, digest: StateDigest) -> Result<(), O::Error> {
        self.append(at, Entry::State(logged_state(&digest)))?;
        if std::mem::take(&mut self.own_digest) { Ok(()) } else { self.live.digest(at, digest) }
    }

    fn ended(&mut self, at: Position, end: End) -> Result<AfterEnd, O::Error> {
        self.append(at, Entry::End(EndReason::Guest(end)))?;
        Ok(match self.live.ended(at, end)? {
            AfterEnd::Finish => {
                self.own_digest = true;
                AfterEnd::FinishWithDigest
            }
            after => after,
        })
    }
}

/// The log's form of an input. The input's bytes are moved to it, until [`give_back`].
fn logged_input(input: &mut Input) -> LoggedInput {
    match input {
        Input::Frame { slot, bytes } => LoggedInput::Frame { slot: *slot, bytes: std::mem::take(bytes) },
        Input::DiskDone { slot, id, result } => {
            LoggedInput::DiskDone { slot: *slot, id: *id, status: disk_status(result) }
        }
        Input::Console { console, bytes } => {
            LoggedInput::Console { console: *console, bytes: std::mem::take(bytes) }
        }
        Input::Clock { time_ns } => LoggedInput::Clock { time_ns: *time_ns },
    }
}

/// Moves the bytes back from the log's form of an input.
fn give_back(input: &mut Input, logged: LoggedInput) {
    if let (
        Input::Frame { bytes, .. } | Input::Console { bytes, .. },
        LoggedInput::Frame { bytes: back, .. } | LoggedInput::Console { bytes: back, .. },
    ) = (input, logged)
    {
        *bytes = back;
    }
}

/// The log's form of a disk's result. Data is logged as its digest.
pub(crate) fn disk_status(result: &DiskResult) -> DiskStatus {
    match result {
        DiskResult::Done => DiskStatus::Done,
        DiskResult::Read(data) => DiskStatus::Read(Digest(XxHash3_128::oneshot(data))),
        DiskResult::Failed => DiskStatus::Failed,
    }
}

/// The log's form of an output.
pub(crate) fn logged_output(output: &Output) -> LoggedOutput {
    let (to, bytes) = match output {
        Output::Frame { slot, bytes } => (OutputTo::Net(*slot), bytes),
        Output::Console { console, bytes } => (OutputTo::Console(*console), bytes),
    };
    LoggedOutput { to, len: bytes.len() as u32, digest: Digest(XxHash3_128::oneshot(bytes)) }
}

/// The log's form of a state: vCPU, RAM, and everything else as one.
pub(crate) fn logged_state(digest: &StateDigest) -> entry::log::StateCheck {
    let part = |name| digest.parts.iter().find(|(n, _)| *n == name).map_or(Digest(0), |(_, d)| *d);
    let mut devices = XxHash3_128::new();
    for (name, d) in &digest.parts {
        if !matches!(*name, "vcpu" | "ram") {
            devices.write(&d.0.to_le_bytes());
        }
    }
    let devices = Digest(devices.finish_128());
    entry::log::StateCheck { vcpu: part("vcpu").into(), devices: devices.into(), ram: part("ram").into() }
}
