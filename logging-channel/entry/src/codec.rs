//! Records as bytes: FORMAT.md, "Entry".
//!
//! Decoding is total: every byte string gives records or an error with its offset. No length read from the
//! input causes an allocation before that many bytes are there.

use crate::log::{
    CheckWord, DiskStatus, EndReason, Entry, LoggedInput, LoggedOutput, OutputTo, Record, StateCheck,
};
use crate::{Answer, Console, Digest, Position, PositionUnit};

/// Longest Ethernet frame, console input or console output, in bytes.
pub const BYTES_MAX: usize = 65_535;
/// Longest answer for the entropy device, in bytes.
pub const ENTROPY_MAX: usize = 65_536;
/// Most check words in one entry.
pub const EXITS_MAX: usize = 1024;
/// Shortest Ethernet frame, in bytes: its header alone.
const FRAME_MIN: usize = 14;

mod kind {
    pub const FRAME: u8 = 1;
    pub const DISK_DONE: u8 = 2;
    pub const CONSOLE_IN: u8 = 3;
    pub const CLOCK: u8 = 4;
    pub const INTERRUPT: u8 = 5;
    pub const ENTROPY: u8 = 16;
    pub const VALUE: u8 = 17;
    pub const FRAME_OUT: u8 = 32;
    pub const CONSOLE_OUT: u8 = 33;
    pub const MARK: u8 = 48;
    pub const STATE: u8 = 49;
    pub const END: u8 = 50;
    pub const EXITS: u8 = 51;
}

/// The bytes are not valid records.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("log: byte {offset}: {fault}")]
pub struct DecodeError {
    /// Offset in the log.
    pub offset: u64,
    /// What is wrong there.
    pub fault: DecodeFault,
}

/// What is wrong with the bytes at an offset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum DecodeFault {
    #[error("this is not a vmft log (the magic number differs)")]
    Magic,
    #[error("the log has version {0}, this vmft reads version {version}", version = crate::block::VERSION)]
    Version(u16),
    #[error("the {0} ends early")]
    Short(&'static str),
    #[error("the length of the {what} is {value}, but must be between {min} and {max}")]
    Range { what: &'static str, value: u64, min: u64, max: u64 },
    #[error("the number is not in its shortest form or exceeds 64 bits")]
    Varint,
    #[error("the {what} is not UTF-8")]
    Utf8 { what: &'static str },
    #[error("identity field {0:?} is not in ascending order")]
    FieldOrder(String),
    #[error("the identity has the unknown position-unit {0:?}")]
    PositionUnit(String),
    #[error("the checksum differs: the log is damaged here, or a block is missing")]
    Checksum,
    #[error("entry kind {0} is unknown")]
    Kind(u8),
    #[error("{what} {value} is unknown")]
    Value { what: &'static str, value: u8 },
    #[error("the length of the {0} is not a whole number of words")]
    Odd(&'static str),
    #[error("the position overflows or descends")]
    Position,
}

/// Appends a record's bytes to `out`. `last` is the position of the previous record, and is set to this
/// one's.
///
/// # Panics
/// If the position is before `last`, or a length exceeds what FORMAT.md allows. The machine never makes such
/// records.
pub fn encode(unit: PositionUnit, last: &mut Position, record: &Record, out: &mut Vec<u8>) {
    let at = record.position;
    let start = out.len();
    out.push(0);
    put_varint(at.count.checked_sub(last.count).expect("positions ascend"), out);
    if has_within(unit) {
        put_varint(at.within, out);
    }
    if unit == PositionUnit::Branches {
        out.extend(at.rip.to_le_bytes());
        out.extend(at.registers.to_le_bytes());
    }
    *last = at;
    out[start] = put_body(&record.entry, out);
}

/// Appends an entry's body and returns its kind.
fn put_body(entry: &Entry, out: &mut Vec<u8>) -> u8 {
    match entry {
        Entry::Input(input) => put_input(input, out),
        Entry::Interrupt { vector } => {
            out.push(*vector);
            kind::INTERRUPT
        }
        Entry::Answer(Answer::Entropy(bytes)) => {
            put_bytes(bytes, 0, ENTROPY_MAX, out);
            kind::ENTROPY
        }
        Entry::Answer(Answer::Value(v)) => {
            out.extend(v.to_le_bytes());
            kind::VALUE
        }
        Entry::Output(o) => {
            let (kind, number) = match o.to {
                OutputTo::Net(slot) => (kind::FRAME_OUT, slot),
                OutputTo::Console(c) => (kind::CONSOLE_OUT, console_number(c)),
            };
            assert!(o.len as usize <= BYTES_MAX, "an output of {} bytes", o.len);
            out.push(number);
            put_varint(o.len as u64, out);
            put_digest(&o.digest, out);
            kind
        }
        Entry::Mark { time_ns } => {
            put_varint(*time_ns, out);
            kind::MARK
        }
        Entry::State(s) => {
            for CheckWord(word) in [s.vcpu, s.devices, s.ram] {
                out.extend(word.to_le_bytes());
            }
            kind::STATE
        }
        Entry::Exits(words) => {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            put_bytes(&bytes, 2, 2 * EXITS_MAX, out);
            kind::EXITS
        }
        Entry::End(reason) => {
            out.push(reason.number());
            kind::END
        }
    }
}

/// Appends an input's body and returns its kind.
fn put_input(input: &LoggedInput, out: &mut Vec<u8>) -> u8 {
    match input {
        LoggedInput::Frame { slot, bytes } => {
            out.push(*slot);
            put_bytes(bytes, FRAME_MIN, BYTES_MAX, out);
            kind::FRAME
        }
        LoggedInput::DiskDone { slot, id, status } => {
            out.push(*slot);
            put_varint(*id, out);
            match status {
                DiskStatus::Done => out.push(0),
                DiskStatus::Read(d) => {
                    out.push(1);
                    put_digest(d, out);
                }
                DiskStatus::Failed => out.push(2),
            }
            kind::DISK_DONE
        }
        LoggedInput::Console { console, bytes } => {
            out.push(console_number(*console));
            put_bytes(bytes, 1, BYTES_MAX, out);
            kind::CONSOLE_IN
        }
        LoggedInput::Clock { time_ns } => {
            put_varint(*time_ns, out);
            kind::CLOCK
        }
    }
}

/// Reads fields and records from bytes.
pub struct ByteReader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Offset of `bytes` in the log, for errors.
    base: u64,
}

impl<'a> ByteReader<'a> {
    /// A reader of `bytes`, which begin at the offset `base` of the log.
    pub fn new(bytes: &'a [u8], base: u64) -> ByteReader<'a> {
        ByteReader { bytes, at: 0, base }
    }

    /// Whether everything has been read.
    pub fn is_done(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// The next byte's offset in the log.
    pub fn offset(&self) -> u64 {
        self.base + self.at as u64
    }

    /// The next record; `last` as in [`encode`].
    ///
    /// # Errors
    /// The bytes are not a valid record; the error has the offset of the wrong field.
    pub fn record(&mut self, unit: PositionUnit, last: &mut Position) -> Result<Record, DecodeError> {
        let start = self.offset();
        let kind = self.byte("kind")?;
        let ascent = self.varint("position")?;
        let count = last.count.checked_add(ascent).ok_or(self.error(start + 1, DecodeFault::Position))?;
        let mut position = Position::exact(count);
        if has_within(unit) {
            position.within = self.varint("position")?;
        }
        if unit == PositionUnit::Branches {
            position.rip = u64::from_le_bytes(self.array("position")?);
            position.registers = u64::from_le_bytes(self.array("position")?);
        }
        if position.within < last.within && ascent == 0 {
            return Err(self.error(start + 1, DecodeFault::Position));
        }
        let entry = self.entry(kind, start)?;
        *last = position;
        Ok(Record { position, entry })
    }

    fn entry(&mut self, kind: u8, start: u64) -> Result<Entry, DecodeError> {
        Ok(match kind {
            kind::FRAME => {
                let slot = self.byte("slot")?;
                let bytes = self.prefixed_bytes("frame", FRAME_MIN, BYTES_MAX)?;
                Entry::Input(LoggedInput::Frame { slot, bytes })
            }
            kind::DISK_DONE => {
                let (slot, id) = (self.byte("slot")?, self.varint("id")?);
                let status = match self.byte("status")? {
                    0 => DiskStatus::Done,
                    1 => DiskStatus::Read(self.digest()?),
                    2 => DiskStatus::Failed,
                    value => return Err(self.unknown("disk status", value)),
                };
                Entry::Input(LoggedInput::DiskDone { slot, id, status })
            }
            kind::CONSOLE_IN => {
                let console = self.console()?;
                let bytes = self.prefixed_bytes("console input", 1, BYTES_MAX)?;
                Entry::Input(LoggedInput::Console { console, bytes })
            }
            kind::CLOCK => Entry::Input(LoggedInput::Clock { time_ns: self.varint("time")? }),
            kind::INTERRUPT => Entry::Interrupt { vector: self.byte("vector")? },
            kind::ENTROPY => {
                let bytes = self.prefixed_bytes("entropy", 0, ENTROPY_MAX)?;
                Entry::Answer(Answer::Entropy(bytes))
            }
            kind::VALUE => Entry::Answer(Answer::Value(u64::from_le_bytes(self.array("value")?))),
            kind::FRAME_OUT => {
                let slot = self.byte("slot")?;
                self.output(OutputTo::Net(slot))?
            }
            kind::CONSOLE_OUT => {
                let console = self.console()?;
                self.output(OutputTo::Console(console))?
            }
            kind::MARK => Entry::Mark { time_ns: self.varint("time")? },
            kind::STATE => Entry::State(StateCheck {
                vcpu: self.check_word()?,
                devices: self.check_word()?,
                ram: self.check_word()?,
            }),
            kind::EXITS => {
                let at = self.offset();
                let bytes = self.prefixed_bytes("exits", 2, 2 * EXITS_MAX)?;
                let (words, []) = bytes.as_chunks() else {
                    return Err(self.error(at, DecodeFault::Odd("exits")));
                };
                Entry::Exits(words.iter().map(|w| u16::from_le_bytes(*w)).collect())
            }
            kind::END => {
                let number = self.byte("reason")?;
                Entry::End(EndReason::numbered(number).ok_or_else(|| self.unknown("end reason", number))?)
            }
            unknown => return Err(self.error(start, DecodeFault::Kind(unknown))),
        })
    }

    fn output(&mut self, to: OutputTo) -> Result<Entry, DecodeError> {
        let len = self.length("output", 0, BYTES_MAX)? as u32;
        Ok(Entry::Output(LoggedOutput { to, len, digest: self.digest()? }))
    }

    fn console(&mut self) -> Result<Console, DecodeError> {
        Ok(match self.byte("console")? {
            0 => Console::Serial,
            n => Console::Virtio(n - 1),
        })
    }

    fn check_word(&mut self) -> Result<CheckWord, DecodeError> {
        self.array("check word").map(|word| CheckWord(u32::from_le_bytes(word)))
    }

    fn digest(&mut self) -> Result<Digest, DecodeError> {
        self.array("digest").map(|b| Digest(u128::from_le_bytes(b)))
    }

    fn error(&self, offset: u64, what: DecodeFault) -> DecodeError {
        DecodeError { offset, fault: what }
    }

    /// The byte just read has an unknown value.
    fn unknown(&self, what: &'static str, value: u8) -> DecodeError {
        self.error(self.offset() - 1, DecodeFault::Value { what, value })
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let rest = &self.bytes[self.at..];
        if n > rest.len() {
            return Err(self.error(self.base + self.bytes.len() as u64, DecodeFault::Short(what)));
        }
        self.at += n;
        Ok(&rest[..n])
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        self.take(N, what).map(|b| *b.first_chunk().expect("take gives as many as asked for"))
    }

    /// The next byte.
    ///
    /// # Errors
    /// There is none.
    pub fn byte(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        self.array::<1>(what).map(|[b]| b)
    }

    /// A number as a varint.
    ///
    /// # Errors
    /// It ends early, exceeds 64 bits or is not in its shortest form.
    pub fn varint(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        let start = self.offset();
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(what)?;
            let bits = (byte & 0x7f) as u64;
            let shortest = byte != 0 || shift == 0;
            if bits << shift >> shift != bits || byte < 0x80 && !shortest {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.error(start, DecodeFault::Varint))
    }

    /// A length as a varint.
    ///
    /// # Errors
    /// It ends early, or is out of bounds.
    pub fn length(&mut self, what: &'static str, min: usize, max: usize) -> Result<usize, DecodeError> {
        let start = self.offset();
        let value = self.varint(what)?;
        if !(min as u64..=max as u64).contains(&value) {
            let what = DecodeFault::Range { what, value, min: min as u64, max: max as u64 };
            return Err(self.error(start, what));
        }
        Ok(value as usize)
    }

    /// Bytes that follow their own length, which is a varint.
    ///
    /// # Errors
    /// They end early, or the length is out of bounds.
    pub fn prefixed_bytes(
        &mut self,
        what: &'static str,
        min: usize,
        max: usize,
    ) -> Result<Vec<u8>, DecodeError> {
        let n = self.length(what, min, max)?;
        self.take(n, what).map(<[u8]>::to_vec)
    }
}

/// Appends a varint.
pub fn put_varint(mut v: u64, out: &mut Vec<u8>) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn put_bytes(bytes: &[u8], min: usize, max: usize, out: &mut Vec<u8>) {
    assert!((min..=max).contains(&bytes.len()), "{} bytes, but only {min} to {max} are allowed", bytes.len());
    put_varint(bytes.len() as u64, out);
    out.extend(bytes);
}

fn put_digest(d: &Digest, out: &mut Vec<u8>) {
    out.extend(d.0.to_le_bytes());
}

/// The number of a console in the log.
fn console_number(c: Console) -> u8 {
    match c {
        Console::Serial => 0,
        Console::Virtio(slot) => slot.checked_add(1).expect("fewer than 255 slots"),
    }
}

/// Whether positions in this unit have [`Position::within`].
fn has_within(unit: PositionUnit) -> bool {
    matches!(unit, PositionUnit::SynchronousExits | PositionUnit::Branches)
}
