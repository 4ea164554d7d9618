//! Everything that crosses the boundary of the machine, as values: inputs and answers that go in, outputs and
//! disk requests that come out, the positions at which they do so, and how a run ends.
//!
//! The log consists of these. This crate does no I/O and depends on nothing that does.
//!
//! [`log`] has the records of the log, [`codec`] and [`block`] their encoding (FORMAT.md), [`identity`] what
//! two sides must have in common.
#![forbid(unsafe_code)]

pub mod block;
pub mod codec;
pub mod identity;
pub mod log;

/// A point in the guest's instruction stream. The positions of one run are ordered. The engine's
/// [`PositionUnit`], which is part of the identity, defines the meaning of the numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Retired instructions, single steps or completed synchronous exits, depending on the unit.
    pub count: u64,
    /// Where between two counts. For [`PositionUnit::SynchronousExits`]: interrupts delivered since the exit,
    /// each at the first interrupt window after its request. For [`PositionUnit::Branches`]: conditional
    /// branches retired. 0 for the exact units.
    pub within: u64,
    /// RIP, for engines that need it to land there (hardware counters); 0 for others.
    pub rip: u64,
    /// Digest of the registers, for engines that need it to verify the position (hardware counters); 0 for
    /// others.
    pub registers: u64,
}

impl Position {
    /// The position `count` in a unit that counts exactly.
    pub const fn exact(count: u64) -> Position {
        Position { count, within: 0, rip: 0, registers: 0 }
    }
}

/// What an engine counts to number positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionUnit {
    /// Retired instructions, exactly; guest time follows them.
    Instructions,
    /// Synchronous exits (port, device memory, MSR, HLT) and the interrupt windows after them.
    SynchronousExits,
    /// Retired conditional branches in guest mode.
    Branches,
    /// Single steps.
    Steps,
}

/// A 128-bit digest of a state or of content.
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
    /// An Ethernet frame for the virtio network device in `slot`, without its frame check sequence.
    Frame {
        /// The device's slot.
        slot: u8,
        /// The frame, from its destination address on.
        bytes: Vec<u8>,
    },
    /// A [`DiskRequest`] is done.
    DiskDone {
        /// The device's slot.
        slot: u8,
        /// [`DiskRequest::id`].
        id: u64,
        /// Its result.
        result: DiskResult,
    },
    /// Bytes typed on a console.
    Console {
        /// Which one.
        console: Console,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Guest time is now at least this. It never goes back: a smaller value changes nothing.
    Clock {
        /// Guest time, in ns since the start of the machine.
        time_ns: u64,
    },
}

/// The result of a [`DiskRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskResult {
    /// A read is done; this is its data, of exactly the length requested.
    Read(Vec<u8>),
    /// A write or flush is done.
    Done,
    /// The guest sees an I/O error. (A failure of the host itself is not an input: it ends the host's part in
    /// the pair.)
    Failed,
}

/// A question of the guest that only the outside world can answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Random bytes for the virtio entropy device.
    Entropy {
        /// The device's slot.
        slot: u8,
        /// How many bytes; at most 65,536.
        len: u32,
    },
    /// The time, for an instruction that cannot be trapped (RDTSC and its like). The answer advances guest
    /// time.
    Time {
        /// Current guest time, in ns. The answer is not less.
        time_ns: u64,
    },
    /// A random number, for an instruction that cannot be trapped (RDRAND, RDSEED).
    Random,
}

/// The answer to a [`Question`], of the same kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Random bytes, of the length requested.
    Entropy(Vec<u8>),
    /// A value for an instruction.
    Value(u64),
}

/// Something that leaves the machine and can be seen outside. The gate holds it.
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

/// A request to the disk in a slot. Each host has its own copy of the disk, so requests pass no gate.
/// Requests that overlap are executed in the order of their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// The device's slot.
    pub slot: u8,
    /// Number of the request. The numbers of a machine ascend.
    pub id: u64,
    /// What to do.
    pub work: DiskWork,
}

/// What a [`DiskRequest`] asks for. Offsets and lengths are in bytes and within the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskWork {
    /// Read `len` bytes.
    Read {
        /// Where to begin.
        offset: u64,
        /// How many; a multiple of 512.
        len: u32,
    },
    /// Write bytes.
    Write {
        /// Where to begin.
        offset: u64,
        /// The bytes; their number is a multiple of 512.
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
