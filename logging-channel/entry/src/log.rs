//! The records of the log: one [`Entry`] for each thing that happened, with its [`Position`].

use std::fmt;

use crate::{Answer, Console, Digest, End, Position};

/// One record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where in the instruction stream it happened.
    pub position: Position,
    /// What happened.
    pub entry: Entry,
}

/// What a record says has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An input.
    Input(LoggedInput),
    /// The engine injected this interrupt here. Only for engines that cannot compute the moment of the
    /// injection.
    Interrupt {
        /// Its vector.
        vector: u8,
    },
    /// The answer to the guest's question.
    Answer(Answer),
    /// An output.
    Output(LoggedOutput),
    /// The primary got here.
    Mark {
        /// Guest time in ns.
        time_ns: u64,
    },
    /// The machine's state here.
    State(StateCheck),
    /// Check words of the synchronous exits since the last such entry, up to this position: one for each
    /// exit.
    Exits(Vec<u16>),
    /// The run ends, or starts over if the guest rebooted.
    End(EndReason),
}

impl Entry {
    /// Name of its kind in FORMAT.md.
    pub fn kind(&self) -> &'static str {
        match self {
            Entry::Input(LoggedInput::Frame { .. }) => "frame",
            Entry::Input(LoggedInput::DiskDone { .. }) => "disk-done",
            Entry::Input(LoggedInput::Console { .. }) => "console-in",
            Entry::Input(LoggedInput::Clock { .. }) => "clock",
            Entry::Interrupt { .. } => "interrupt",
            Entry::Answer(Answer::Entropy(_)) => "entropy",
            Entry::Answer(Answer::Value(_)) => "value",
            Entry::Output(LoggedOutput { to: OutputTo::Net(_), .. }) => "frame-out",
            Entry::Output(LoggedOutput { to: OutputTo::Console(_), .. }) => "console-out",
            Entry::Mark { .. } => "mark",
            Entry::State(_) => "state",
            Entry::Exits(_) => "exits",
            Entry::End(_) => "end",
        }
    }
}

/// The kinds of entries, as [`Entry::kind`] has them.
pub const KINDS: [&str; 13] = [
    "frame",
    "disk-done",
    "console-in",
    "clock",
    "interrupt",
    "entropy",
    "value",
    "frame-out",
    "console-out",
    "mark",
    "state",
    "exits",
    "end",
];

/// An input as it is logged: without a disk's data, because each side reads its own copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoggedInput {
    /// [`crate::Input::Frame`].
    Frame {
        /// The device's slot.
        slot: u8,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// [`crate::Input::DiskDone`].
    DiskDone {
        /// The device's slot.
        slot: u8,
        /// The request.
        id: u64,
        /// Its result.
        status: DiskStatus,
    },
    /// [`crate::Input::Console`].
    Console {
        /// Which one.
        console: Console,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// [`crate::Input::Clock`].
    Clock {
        /// Guest time in ns.
        time_ns: u64,
    },
}

/// [`crate::DiskResult`] with a digest in place of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskStatus {
    /// A write or flush is done.
    Done,
    /// A read is done; its data has this digest.
    Read(Digest),
    /// The guest sees an I/O error.
    Failed,
}

/// An output as it is logged: replay produces the content again, and the digest checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedOutput {
    /// Where it went.
    pub to: OutputTo,
    /// Length of the content, in bytes.
    pub len: u32,
    /// Digest of the content.
    pub digest: Digest,
}

/// Where an output went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputTo {
    /// To the network of the device in this slot.
    Net(u8),
    /// To a console.
    Console(Console),
}

/// The low 32 bits of a digest. A log has many states, and states that differ once go on differing. So if a
/// check word misses a difference, with a chance of one in four billion, the next one finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckWord(pub u32);

impl From<Digest> for CheckWord {
    fn from(digest: Digest) -> CheckWord {
        CheckWord(digest.0 as u32)
    }
}

impl fmt::Display for CheckWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Check words of the digests of the machine's parts, to compare the state of a replay with the recorded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateCheck {
    /// vCPU.
    pub vcpu: CheckWord,
    /// Devices, clock and interrupt lines.
    pub devices: CheckWord,
    /// RAM.
    pub ram: CheckWord,
}

/// How a log's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The guest ended it.
    Guest(End),
    /// The user stopped it.
    Stopped,
}

impl EndReason {
    /// Its number in FORMAT.md.
    pub fn number(self) -> u8 {
        match self {
            EndReason::Guest(End::PowerOff) => 0,
            EndReason::Guest(End::Reboot) => 1,
            EndReason::Guest(End::TripleFault) => 2,
            EndReason::Stopped => 3,
        }
    }

    /// The reason with this number in FORMAT.md.
    pub fn numbered(number: u8) -> Option<EndReason> {
        Some(match number {
            0 => EndReason::Guest(End::PowerOff),
            1 => EndReason::Guest(End::Reboot),
            2 => EndReason::Guest(End::TripleFault),
            3 => EndReason::Stopped,
            _ => return None,
        })
    }
}

impl fmt::Display for Record {
    /// One line: position, kind, and the essentials of the body.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.position.count)?;
        if self.position.within != 0 {
            write!(f, "+{} ", self.position.within)?;
        }
        write!(f, "{}", self.entry.kind())?;
        match &self.entry {
            Entry::Input(LoggedInput::Frame { slot, bytes }) => {
                write!(f, " slot {slot}, {} bytes", bytes.len())
            }
            Entry::Input(LoggedInput::DiskDone { slot, id, status }) => {
                write!(f, " slot {slot}, request {id}: ")?;
                match status {
                    DiskStatus::Done => write!(f, "done"),
                    DiskStatus::Read(digest) => write!(f, "read {digest}"),
                    DiskStatus::Failed => write!(f, "failed"),
                }
            }
            Entry::Input(LoggedInput::Console { console, bytes }) => {
                write!(f, " {console:?} \"{}\"", bytes.escape_ascii())
            }
            Entry::Input(LoggedInput::Clock { time_ns }) => write!(f, " {time_ns} ns"),
            Entry::Interrupt { vector } => write!(f, " vector {vector:#x}"),
            Entry::Answer(Answer::Entropy(bytes)) => {
                write!(f, " {} bytes", bytes.len())
            }
            Entry::Answer(Answer::Value(value)) => write!(f, " {value:#x}"),
            Entry::Output(LoggedOutput { to, len, digest }) => write!(f, " {to:?}, {len} bytes, {digest}"),
            Entry::Mark { time_ns } => write!(f, " {time_ns} ns"),
            Entry::State(s) => write!(f, " vcpu {} devices {} ram {}", s.vcpu, s.devices, s.ram),
            Entry::Exits(words) => write!(f, " {}", words.len()),
            Entry::End(reason) => write!(f, " {reason:?}"),
        }
    }
}
