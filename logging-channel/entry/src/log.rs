//! What the log says: one [`Entry`] for each thing that happened, at its [`Position`].

use crate::{Answer, Console, Digest, End, Position};

/// One record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where in the instruction stream.
    pub position: Position,
    /// What.
    pub entry: Entry,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An input.
    Input(LoggedInput),
    /// The engine injected this interrupt here. Only engines whose moment of injection is not computed.
    Interrupt {
        /// Vector.
        vector: u8,
    },
    /// What the outside answered to the guest's question.
    Answer(LoggedAnswer),
    /// Something left the machine.
    Output(LoggedOutput),
    /// The primary got here.
    Mark,
    /// The machine's state here.
    State(StateDigest),
    /// The run ends, or with [`EndReason::Reboot`] starts over.
    End(EndReason),
}

/// An input as the log has it: a disk's data is not in it, for each side reads its own copy.
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
        /// What came of it.
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
    /// A read gave data of this digest.
    Read(Digest),
    /// The guest sees an I/O error.
    Failed,
}

/// What the guest was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoggedAnswer {
    /// To a question of a device.
    Device(Answer),
    /// To an instruction that cannot be hidden, as RDTSC on KVM.
    Value(u64),
}

/// An output as the log has it: replay makes the content again, the digest checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedOutput {
    /// Where it went.
    pub to: OutputTo,
    /// Bytes.
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

/// Digests of the machine's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateDigest {
    /// vCPU.
    pub vcpu: Digest,
    /// Devices, clock and interrupt lines.
    pub devices: Digest,
    /// RAM.
    pub ram: Digest,
}

/// How a log's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// By the guest.
    Guest(End),
    /// By the user.
    Stopped,
}
