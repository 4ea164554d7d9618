//! What crosses the border of the machine, as values: inputs and answers that go in, outputs and disk requests
//! that come out, the positions at which they do, and how a run ends.
//!
//! The log is made of these. This crate does no I/O and depends on nothing that does.
//!
//! [`log`] has the records that the log is made of, [`codec`] and [`block`] their bytes (FORMAT.md), [`identity`]
//! what two sides must share.
#![forbid(unsafe_code)]

pub mod block;
pub mod codec;
pub mod identity;
pub mod log;

/// A point in the guest's instruction stream. Positions of one run are ordered; the meaning of the numbers is
/// the engine's [`PositionUnit`], which is part of the identity that both sides share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Retired instructions, single steps or completed synchronous exits, by unit.
    pub count: u64,
    /// Where between two counts: for [`PositionUnit::SynchronousExits`] how many interrupts were delivered since the
    /// exit, each at the first window after it was asked for; for [`PositionUnit::Branches`] the conditional branches retired; 0 for the exact units.
    pub within: u64,
    /// RIP where the engine needs it to seek (hardware counters), 0 elsewhere.
    pub rip: u64,
    /// Digest of the registers where the engine needs it to be sure (hardware counters), 0 elsewhere.
    pub registers: u64,
}

impl Position {
    /// The position `count` of a unit that counts exactly.
    pub const fn exact(count: u64) -> Position {
        Position { count, within: 0, rip: 0, registers: 0 }
    }
}

/// What an engine counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionUnit {
    /// Retired instructions, exact; guest time follows them.
    Instructions,
    /// Synchronous exits (a port, device memory, an MSR, HLT) and the interrupt windows after them.
    SynchronousExits,
    /// Retired conditional branches in guest mode.
    Branches,
    /// Single steps.
    Steps,
}

/// A 128-bit digest of state or content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub u128);

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A console of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Console {
    /// The 16550 at port 0x3f8.
    Serial,
    /// The virtio console in this slot.
    Virtio(u8),
}

/// Something from outside, applied to the machine at a position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// An Ethernet frame for the virtio network device in `slot`, without frame check sequence.
    Frame {
        /// The device's slot.
        slot: u8,
        /// The frame, from the destination address on.
        bytes: Vec<u8>,
    },
    /// The end of a [`DiskRequest`].
    DiskDone {
        /// The device's slot.
        slot: u8,
        /// [`DiskRequest::id`].
        id: u64,
        /// What came of it.
        result: DiskResult,
    },
    /// Bytes typed on a console.
    Console {
        /// Which one.
        console: Console,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Guest time is at least this. It never goes back: a smaller value changes nothing.
    Clock {
        /// Guest time in ns since the start of the machine.
        time_ns: u64,
    },
}

/// What came of a [`DiskRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskResult {
    /// The data that a read asked for, of exactly its length.
    Read(Vec<u8>),
    /// A write or flush is done.
    Done,
    /// The guest sees an I/O error. (A host's own failure is no input: it ends the host's part in the pair.)
    Failed,
}

/// A question of the guest that only the outside can answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Random bytes for the virtio entropy device.
    Entropy {
        /// The device's slot.
        slot: u8,
        /// How many bytes, at most 65536.
        len: u32,
    },
    /// What the time is, for an instruction that cannot be hidden (RDTSC and its like). The answer moves guest time.
    Time {
        /// Guest time in ns: the answer is not less.
        time_ns: u64,
    },
    /// A random number, for an instruction that cannot be hidden (RDRAND, RDSEED).
    Random,
}

/// The answer to a [`Question`], of the same kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Random bytes, of the length asked for.
    Entropy(Vec<u8>),
    /// For an instruction.
    Value(u64),
}

/// What leaves the machine and may be seen by somebody else, so the gate holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// An Ethernet frame.
    Frame {
        /// The device's slot.
        slot: u8,
        /// The frame, from the destination address on.
        bytes: Vec<u8>,
    },
    /// Bytes printed on a console.
    Console {
        /// Which one.
        console: Console,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// A request to the disk in a slot. Each host has its own copy, so it passes no gate. Requests that overlap run
/// in the order of their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// The device's slot.
    pub slot: u8,
    /// Number of the request, ascending for each machine.
    pub id: u64,
    /// What to do.
    pub work: DiskWork,
}

/// What a [`DiskRequest`] asks for. Offsets and lengths are in bytes and inside the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskWork {
    /// Read `len` bytes.
    Read {
        /// Where from.
        offset: u64,
        /// How many, a multiple of 512.
        len: u32,
    },
    /// Write these bytes, a multiple of 512.
    Write {
        /// Where to.
        offset: u64,
        /// What.
        data: std::sync::Arc<[u8]>,
    },
    /// Make everything written so far durable.
    Flush,
}

/// How a run of the guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// Triple fault: the guest's CPU cannot go on.
    TripleFault,
}
