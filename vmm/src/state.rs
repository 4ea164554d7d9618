//! A machine saved to bytes, and made again from them.
//!
//! The file begins with [`MAGIC`] and the format's version (u32). Then come sections in the order of [`Section`]:
//! tag (u32), length of the content (u64), content, XXH3-64 of the content. Numbers are little-endian. MachineIdentity, vCPU, clock
//! and devices are postcard; RAM is pages that are not zero, each as page number (u32) and 4096 bytes, ascending.
//!
//! Reading never panics and never allocates by a number from the file. Every error has the offset.

use std::hash::Hasher;
use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use twox_hash::XxHash3_64;

use crate::clock::Clock;
use crate::config::MachineIdentity;
use crate::devices::Devices;
use crate::machine::{Machine, MachineError};
use crate::ram::{PAGE, is_zero};
use crate::vcpu::VcpuState;

/// First bytes of a saved machine.
pub const MAGIC: [u8; 8] = *b"vmft-mac";
/// Version of the format.
pub const VERSION: u32 = 1;
/// A section other than RAM is smaller.
const SECTION_MAX: u64 = 64 << 20;

/// Sections by tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Section {
    Identity = 1,
    Vcpu = 2,
    Clock = 3,
    Devices = 4,
    Ram = 5,
}

/// Why a machine was not saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Reading or writing failed.
    #[error("saved machine: input or output failed at offset {offset}")]
    Io {
        /// Bytes read or written before.
        offset: u64,
        /// The host's error.
        source: io::Error,
    },
    /// It is no saved machine.
    #[error("this is no saved machine: it does not begin with {MAGIC:?}")]
    Magic,
    /// Another version wrote it.
    #[error("the saved machine has format version {0}, this program reads {VERSION}")]
    Version(u32),
    /// Bytes are wrong.
    #[error("the saved machine is damaged at offset {offset}: {what}")]
    Damaged {
        /// Start of what is damaged.
        offset: u64,
        /// What it is.
        what: &'static str,
    },
    /// It was saved from a machine with another configuration or boot files.
    #[error("the saved machine differs from the configured one in: {0}")]
    OtherMachine(&'static str),
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl Machine {
    /// Writes the whole state. To be called at a whole boundary, not while a question waits.
    pub fn save(&mut self, to: &mut impl Write) -> Result<(), StateError> {
        let mut file = Writer { to, offset: 0 };
        file.put(&MAGIC)?;
        file.put(&VERSION.to_le_bytes())?;
        file.section(Section::Identity, &self.identity())?;
        file.section(Section::Vcpu, &self.vcpu_state()?)?;
        file.section(Section::Clock, &self.clock)?;
        file.section(Section::Devices, &self.devices)?;
        self.save_ram(&mut file)
    }

    fn save_ram(&mut self, file: &mut Writer<'_, impl Write>) -> Result<(), StateError> {
        let pages: Vec<u32> = (0..self.ram.pages()).filter(|page| !is_zero(self.ram.page(*page))).collect();
        file.put(&(Section::Ram as u32).to_le_bytes())?;
        file.put(&(pages.len() as u64 * (4 + PAGE as u64)).to_le_bytes())?;
        let mut hash = XxHash3_64::new();
        for page in pages {
            for part in [&page.to_le_bytes()[..], &self.ram.page(page)[..]] {
                hash.write(part);
                file.put(part)?;
            }
        }
        file.put(&hash.finish().to_le_bytes())
    }

    /// Takes over a saved state. The machine must have been made from the same configuration and boot files. After an
    /// error it is in no state to go on with.
    ///
    /// Disk requests that were on their way are in [`Machine::unfinished_disk_requests`].
    pub fn restore(&mut self, from: &mut impl Read) -> Result<(), StateError> {
        let mut file = Reader { from, offset: 0 };
        if file.array()? != MAGIC {
            return Err(StateError::Magic);
        }
        let version = u32::from_le_bytes(file.array()?);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let identity: MachineIdentity = file.section(Section::Identity)?;
        if let Some(field) = identity.difference(&self.identity()) {
            return Err(StateError::OtherMachine(field));
        }
        let vcpu: VcpuState = file.section(Section::Vcpu)?;
        let clock: Clock = file.section(Section::Clock)?;
        let at = file.offset;
        let devices: Devices = file.section(Section::Devices)?;
        if !devices.has_shape_of(&self.devices) {
            return Err(StateError::Damaged { offset: at, what: "devices of another machine" });
        }
        self.restore_ram(&mut file)?;
        self.vcpu.restore(&vcpu).map_err(MachineError::from)?;
        self.adopt(clock, devices);
        Ok(())
    }

    fn restore_ram(&mut self, file: &mut Reader<'_, impl Read>) -> Result<(), StateError> {
        self.ram.clear().map_err(MachineError::from)?;
        let length = file.header(Section::Ram)?;
        let start = file.offset;
        let damaged = |offset, what| StateError::Damaged { offset, what };
        if !length.is_multiple_of(4 + PAGE as u64) || length / (4 + PAGE as u64) > self.ram.pages().into() {
            return Err(damaged(start - 8, "length of RAM"));
        }
        let mut hash = XxHash3_64::new();
        let mut next = 0;
        for _ in 0..length / (4 + PAGE as u64) {
            let at = file.offset;
            let number: [u8; 4] = file.array()?;
            let page = u32::from_le_bytes(number);
            if page < next || page >= self.ram.pages() {
                return Err(damaged(at, "page number"));
            }
            next = page + 1;
            file.fill(self.ram.page(page))?;
            self.ram.note_written(page);
            hash.write(&number);
            hash.write(self.ram.page(page));
        }
        if u64::from_le_bytes(file.array()?) != hash.finish() {
            return Err(damaged(start, "checksum of RAM"));
        }
        Ok(())
    }
}

struct Writer<'a, W> {
    to: &'a mut W,
    offset: u64,
}

impl<W: Write> Writer<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.to.write_all(bytes).map_err(|source| StateError::Io { offset: self.offset, source })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn section(&mut self, section: Section, value: &impl Serialize) -> Result<(), StateError> {
        let content = postcard::to_stdvec(value).unwrap_or_else(|error| unreachable!("plain data: {error}"));
        self.put(&(section as u32).to_le_bytes())?;
        self.put(&(content.len() as u64).to_le_bytes())?;
        self.put(&content)?;
        self.put(&XxHash3_64::oneshot(&content).to_le_bytes())
    }
}

struct Reader<'a, R> {
    from: &'a mut R,
    offset: u64,
}

impl<R: Read> Reader<'_, R> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), StateError> {
        self.from.read_exact(bytes).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                StateError::Damaged { offset: self.offset, what: "it ends early" }
            }
            _ => StateError::Io { offset: self.offset, source },
        })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Tag and length of the section that must follow.
    fn header(&mut self, section: Section) -> Result<u64, StateError> {
        let offset = self.offset;
        if u32::from_le_bytes(self.array()?) != section as u32 {
            return Err(StateError::Damaged { offset, what: "another section was expected" });
        }
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn section<T: DeserializeOwned>(&mut self, section: Section) -> Result<T, StateError> {
        let length = self.header(section)?;
        let offset = self.offset;
        if length > SECTION_MAX {
            return Err(StateError::Damaged { offset: offset - 8, what: "length of a section" });
        }
        let mut content = Vec::new();
        // Grows with what is there, not with what the length promises.
        self.from
            .by_ref()
            .take(length)
            .read_to_end(&mut content)
            .map_err(|source| StateError::Io { offset, source })?;
        if (content.len() as u64) < length {
            let offset = offset + content.len() as u64;
            return Err(StateError::Damaged { offset, what: "it ends early" });
        }
        self.offset += length;
        if u64::from_le_bytes(self.array()?) != XxHash3_64::oneshot(&content) {
            return Err(StateError::Damaged { offset, what: "checksum of a section" });
        }
        postcard::from_bytes(&content)
            .map_err(|_| StateError::Damaged { offset, what: "content of a section" })
    }
}
