//! Saving a machine to bytes, and restoring it from them.
//!
//! The file begins with [`MAGIC`] and the version of the format (u32). Then come five sections: identity, vCPU, clock, devices
//! and RAM. Each is a tag (u32, 1 to 5 in this order), the length of the content (u64), the content, and XXH3-64 of the content.
//! Numbers are little-endian. Identity, vCPU, clock and devices are in postcard's encoding; RAM is the pages that are not zero,
//! each as page number (u32) and 4096 bytes, in ascending order.
//!
//! Reading never panics and never allocates by a number from the file. Every error says at which offset.

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
/// The largest content of a section other than RAM, bytes.
const SECTION_MAX: u64 = 64 << 20;

/// The sections, with their tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum StateSection {
    Identity = 1,
    Vcpu = 2,
    Clock = 3,
    Devices = 4,
    Ram = 5,
}

/// Why a machine was not saved or not restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Reading or writing failed.
    #[error("the saved machine cannot be read or written at offset {offset}: {source}")]
    Io {
        /// Number of bytes read or written before.
        offset: u64,
        /// The host's error.
        source: io::Error,
    },
    /// The file is not a saved machine.
    #[error("the file is not a saved machine: it does not begin with {:?}", MAGIC.escape_ascii().to_string())]
    Magic,
    /// The file has another version of the format.
    #[error("the saved machine has format version {0}, but this program reads version {VERSION} only")]
    Version(u32),
    /// The file is damaged.
    #[error("the saved machine is damaged at offset {offset}: {what}")]
    Damaged {
        /// Offset at which the damaged part begins.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// The machine was saved with another configuration or other boot files.
    #[error("the saved machine differs from the configured one in: {0}")]
    OtherMachine(&'static str),
    /// The machine or its engine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl Machine {
    /// Writes the whole state. To be called at an instruction boundary, not while a question is open.
    ///
    /// # Errors
    /// Writing failed, or the engine did.
    pub fn save(&mut self, to: &mut impl Write) -> Result<(), StateError> {
        let mut file = StateWriter { to, offset: 0 };
        file.put(&MAGIC)?;
        file.put(&VERSION.to_le_bytes())?;
        file.section(StateSection::Identity, &self.identity())?;
        file.section(StateSection::Vcpu, &self.vcpu_state()?)?;
        file.section(StateSection::Clock, &self.clock)?;
        file.section(StateSection::Devices, &self.devices)?;
        self.save_ram(&mut file)
    }

    fn save_ram(&mut self, file: &mut StateWriter<'_, impl Write>) -> Result<(), StateError> {
        let pages: Vec<u32> = (0..self.ram.pages()).filter(|page| !is_zero(self.ram.page(*page))).collect();
        file.put(&(StateSection::Ram as u32).to_le_bytes())?;
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

    /// Takes over a saved state. The machine must have been made from the same configuration and boot files.
    ///
    /// Disk requests that were not completed are in [`Machine::unfinished_disk_requests`].
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or belongs to another machine. The machine must not be used any more then.
    pub fn restore(&mut self, from: &mut impl Read) -> Result<(), StateError> {
        let mut file = StateReader { from, offset: 0 };
        if file.array()? != MAGIC {
            return Err(StateError::Magic);
        }
        let version = u32::from_le_bytes(file.array()?);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let identity: MachineIdentity = file.section(StateSection::Identity)?;
        if let Some(field) = identity.difference(&self.identity()) {
            return Err(StateError::OtherMachine(field));
        }
        let vcpu: VcpuState = file.section(StateSection::Vcpu)?;
        let clock: Clock = file.section(StateSection::Clock)?;
        let at = file.offset;
        let devices: Devices = file.section(StateSection::Devices)?;
        if !devices.has_shape_of(&self.devices) {
            return Err(StateError::Damaged { offset: at, what: "its devices are those of another machine" });
        }
        self.restore_ram(&mut file)?;
        self.vcpu.restore(&vcpu).map_err(MachineError::from)?;
        self.replace_devices(clock, devices);
        Ok(())
    }

    fn restore_ram(&mut self, file: &mut StateReader<'_, impl Read>) -> Result<(), StateError> {
        self.ram.clear().map_err(MachineError::from)?;
        let length = file.header(StateSection::Ram)?;
        let start = file.offset;
        let damaged = |offset, what| StateError::Damaged { offset, what };
        if !length.is_multiple_of(4 + PAGE as u64) || length / (4 + PAGE as u64) > self.ram.pages().into() {
            return Err(damaged(start - 8, "the length of RAM is wrong"));
        }
        let mut hash = XxHash3_64::new();
        let mut next = 0;
        for _ in 0..length / (4 + PAGE as u64) {
            let at = file.offset;
            let number: [u8; 4] = file.array()?;
            let page = u32::from_le_bytes(number);
            if page < next || page >= self.ram.pages() {
                return Err(damaged(at, "a page number is wrong"));
            }
            next = page + 1;
            file.fill(self.ram.page(page))?;
            self.ram.note_written(page);
            hash.write(&number);
            hash.write(self.ram.page(page));
        }
        if u64::from_le_bytes(file.array()?) != hash.finish() {
            return Err(damaged(start, "the checksum of RAM does not match"));
        }
        Ok(())
    }
}

struct StateWriter<'a, W> {
    to: &'a mut W,
    offset: u64,
}

impl<W: Write> StateWriter<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.to.write_all(bytes).map_err(|source| StateError::Io { offset: self.offset, source })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn section(&mut self, section: StateSection, value: &impl Serialize) -> Result<(), StateError> {
        let content = postcard::to_stdvec(value).unwrap_or_else(|error| unreachable!("plain data: {error}"));
        self.put(&(section as u32).to_le_bytes())?;
        self.put(&(content.len() as u64).to_le_bytes())?;
        self.put(&content)?;
        self.put(&XxHash3_64::oneshot(&content).to_le_bytes())
    }
}

struct StateReader<'a, R> {
    from: &'a mut R,
    offset: u64,
}

impl<R: Read> StateReader<'_, R> {
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

    /// Reads the tag of `section`, which must follow, and returns the length of its content.
    fn header(&mut self, section: StateSection) -> Result<u64, StateError> {
        let offset = self.offset;
        if u32::from_le_bytes(self.array()?) != section as u32 {
            return Err(StateError::Damaged { offset, what: "another section was expected" });
        }
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn section<T: DeserializeOwned>(&mut self, section: StateSection) -> Result<T, StateError> {
        let length = self.header(section)?;
        let offset = self.offset;
        if length > SECTION_MAX {
            return Err(StateError::Damaged { offset: offset - 8, what: "the length of a section is wrong" });
        }
        let mut content = Vec::new();
        // Allocates for the bytes that are there, not for the length that the file claims.
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
            return Err(StateError::Damaged { offset, what: "the checksum of a section does not match" });
        }
        postcard::from_bytes(&content)
            .map_err(|_| StateError::Damaged { offset, what: "the content of a section cannot be decoded" })
    }
}
