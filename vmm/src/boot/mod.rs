//! Boot by the Linux 64-bit protocol (Documentation/x86/boot.rst). A plan is made and checked before the machine exists;
//! then, and again at every reset, everything is written to RAM according to it.
//!
//! | address | content |
//! |---|---|
//! | 0x0500 | GDT |
//! | 0x7000 | boot parameters ("zero page") |
//! | 0x8000 | setup data: seed of the guest's random numbers |
//! | 0x9000 to 0xefff | page tables that map the first 4 GiB to themselves |
//! | 0x20000 | command line |
//! | from 0x100000 | kernel |
//! | end of RAM under 2 GiB | initramfs |

use std::io::Cursor;
use std::sync::Arc;

use entry::Digest;
use linux_loader::bootparam::{SETUP_RNG_SEED, boot_e820_entry, boot_params, setup_header};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use twox_hash::XxHash3_128;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use crate::config::{MachineConfig, VIRTIO_BASE, VIRTIO_IRQS, VIRTIO_SIZE, VIRTIO_STRIDE};
use crate::ram::{HOLE_END, HOLE_START, PAGE, Ram};
use crate::vcpu::Start;

mod kernel;
pub mod rewrite;

pub use kernel::KernelError;
use kernel::{HIGH_START, Kernel, KernelFormat};
use rewrite::Rewritten;

const GDT: u64 = 0x500;
const BOOT_PARAMS: u64 = 0x7000;
const SETUP_DATA: u64 = 0x8000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x20000;
/// Longest command line with its terminating zero, bytes: COMMAND_LINE_SIZE of Linux on x86.
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of usable memory below 1 MiB. Firmware keeps its extended data from here on.
const LOW_END: u64 = 0x9fc00;
/// Highest end of an initramfs that Linux accepts (initrd_addr_max of its header).
const INITRD_END: u64 = 0x8000_0000;
const E820_RAM: u32 = 1;

/// The content of a file, with its name for messages.
#[derive(Clone, Debug)]
pub struct BootFile {
    name: String,
    bytes: Arc<Vec<u8>>,
    digest: Digest,
}

impl BootFile {
    /// A file that was read from `name`. Its digest is computed here, once.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> BootFile {
        let digest = Digest(XxHash3_128::oneshot(&bytes));
        BootFile { name: name.into(), bytes: Arc::new(bytes), digest }
    }

    /// The path from which it was read, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Digest of its bytes.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootFiles {
    /// The kernel: vmlinux (ELF) or bzImage.
    pub kernel: BootFile,
    /// The initramfs.
    pub initrd: Option<BootFile>,
    /// Command line. A parameter for each virtio device is appended.
    pub command_line: String,
    /// Seed of the guest's random numbers (SETUP_RNG_SEED).
    pub seed: Option<[u8; 32]>,
    /// Rewrite the kernel's instructions that read the time or random numbers, because the engine cannot trap them ([`rewrite`]).
    pub rewrite: bool,
}

/// The guest cannot be booted from these files. The message names the file or the field.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel cannot be used.
    #[error("kernel {file}: {problem}")]
    Kernel {
        /// Name of the file.
        file: String,
        /// What is wrong with it.
        problem: KernelError,
    },
    /// The initramfs does not fit; give the guest more memory.
    #[error(
        "initrd {file}: {bytes} bytes do not fit between the kernel's end at {start:#x} and {end:#x}; give the guest more memory"
    )]
    Initrd {
        /// Name of the file.
        file: String,
        /// Size of the file.
        bytes: u64,
        /// End of the kernel.
        start: u64,
        /// End of the memory that could hold the initramfs.
        end: u64,
    },
    /// The initramfs is empty.
    #[error("initrd {0}: the file is empty")]
    EmptyInitrd(String),
    /// The command line is too long.
    #[error(
        "cmdline: it has {bytes} bytes with the parameters for the devices, but at most {max} are possible; shorten it"
    )]
    CommandLineLength {
        /// Its length.
        bytes: usize,
        /// The longest possible length.
        max: usize,
    },
    /// The command line has characters that are not printable ASCII.
    #[error("cmdline: it contains a character that is not printable ASCII; remove it")]
    CommandLineCharacters,
    /// A write to guest memory failed although its place had been checked: a bug.
    #[error("boot: writing to guest memory failed")]
    Memory(#[from] GuestMemoryError),
}

/// Where everything goes that a guest is booted from.
#[derive(Clone, Debug)]
pub struct BootPlan {
    kernel_file: BootFile,
    kernel: Kernel,
    initrd: Option<(BootFile, u64)>,
    command_line: Vec<u8>,
    seed: Option<[u8; 32]>,
    memory_bytes: u64,
    digest: u128,
    rewritten: Option<Rewritten>,
}

impl BootPlan {
    /// Checks the files against the machine, and decides where everything goes.
    ///
    /// # Errors
    /// A file or the command line is wrong or does not fit.
    pub fn new(files: &BootFiles, config: &MachineConfig) -> Result<BootPlan, BootError> {
        let low_end = config.memory_bytes.min(HOLE_START);
        let kernel = Kernel::parse(&files.kernel.bytes, low_end)
            .map_err(|problem| BootError::Kernel { file: files.kernel.name.clone(), problem })?;
        let initrd = match &files.initrd {
            None => None,
            Some(file) => Some((file.clone(), initrd_address(file, &kernel, low_end)?)),
        };
        let max = kernel.command_line_max.min(COMMAND_LINE_MAX);
        let command_line = command_line(&files.command_line, config.slots.len(), max)?;
        let digest = digest(files, &command_line);
        let (kernel_file, rewritten) = match files.rewrite.then(|| rewrite::rewrite(&files.kernel.bytes)) {
            Some(Some((bytes, rewritten))) => (BootFile::new(&files.kernel.name, bytes), Some(rewritten)),
            _ => (files.kernel.clone(), None),
        };
        Ok(BootPlan {
            kernel_file,
            kernel,
            initrd,
            command_line,
            seed: files.seed,
            memory_bytes: config.memory_bytes,
            digest,
            rewritten,
        })
    }

    /// Which instructions of the kernel were rewritten; `None` if none was to be, or if the code of the kernel cannot be found.
    pub fn rewritten(&self) -> Option<&Rewritten> {
        self.rewritten.as_ref()
    }

    /// Digest of everything that the guest is booted from.
    pub fn digest(&self) -> u128 {
        self.digest
    }

    /// The command line with the parameters for the devices.
    pub fn command_line(&self) -> &str {
        std::str::from_utf8(&self.command_line).unwrap_or_default().trim_end_matches('\0')
    }

    /// Writes everything to RAM, which must be zero, and returns the state in which the CPU starts.
    ///
    /// # Errors
    /// The kernel cannot be loaded, or a write failed.
    pub fn load(&self, ram: &mut Ram) -> Result<Start, BootError> {
        self.load_kernel(ram)?;
        if let Some((file, at)) = &self.initrd {
            ram.load((*at / PAGE as u64) as u32, file.bytes.clone());
        }
        let memory = ram.memory();
        memory.write_slice(&self.command_line, GuestAddress(COMMAND_LINE))?;
        if let Some(seed) = &self.seed {
            // struct setup_data: next, type, len, data.
            memory.write_obj(0u64, GuestAddress(SETUP_DATA))?;
            memory.write_obj(SETUP_RNG_SEED, GuestAddress(SETUP_DATA + 8))?;
            memory.write_obj(seed.len() as u32, GuestAddress(SETUP_DATA + 12))?;
            memory.write_slice(seed, GuestAddress(SETUP_DATA + 16))?;
        }
        memory.write_slice(self.boot_params().as_slice(), GuestAddress(BOOT_PARAMS))?;
        write_page_tables(ram)?;
        write_gdt(ram)?;
        Ok(Start { entry: self.kernel.entry, boot_params: BOOT_PARAMS, page_tables: PAGE_TABLES, gdt: GDT })
    }

    fn load_kernel(&self, ram: &Ram) -> Result<(), BootError> {
        let mut image = Cursor::new(self.kernel_file.bytes());
        // With an address given, the ELF loader does not look for a PVH note, and adds the address to that of each segment.
        let loaded = match self.kernel.format {
            KernelFormat::Elf => Elf::load(ram.memory(), Some(GuestAddress(0)), &mut image, None),
            KernelFormat::BzImage(_) => {
                BzImage::load(ram.memory(), Some(GuestAddress(self.kernel.start)), &mut image, None)
            }
        };
        loaded.map(|_| ()).map_err(|error| BootError::Kernel {
            file: self.kernel_file.name.clone(),
            problem: KernelError::Loader(error),
        })
    }

    fn boot_params(&self) -> boot_params {
        let mut header = match self.kernel.format {
            KernelFormat::BzImage(header) => header,
            KernelFormat::Elf => setup_header {
                boot_flag: 0xaa55,
                header: u32::from_le_bytes(*b"HdrS"),
                version: 0x20f,
                kernel_alignment: 0x20_0000,
                ..setup_header::default()
            },
        };
        // 0xff: a boot loader without an assigned number. Bit 0 of loadflags: the kernel is at its high address.
        header.type_of_loader = 0xff;
        header.loadflags |= 1;
        header.cmd_line_ptr = COMMAND_LINE as u32;
        header.cmdline_size = self.command_line.len() as u32;
        if let Some((file, at)) = &self.initrd {
            header.ramdisk_image = *at as u32;
            header.ramdisk_size = file.bytes.len() as u32;
        }
        if self.seed.is_some() {
            header.setup_data = SETUP_DATA;
        }
        let mut params = boot_params { hdr: header, ..boot_params::default() };
        for (entry, (start, end)) in params.e820_table.iter_mut().zip(memory_map(self.memory_bytes)) {
            *entry = boot_e820_entry { addr: start, size: end - start, r#type: E820_RAM };
            params.e820_entries += 1;
        }
        params
    }
}

/// Ranges of usable memory, as start and end.
fn memory_map(memory_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let low_end = memory_bytes.min(HOLE_START);
    [(0, LOW_END), (HIGH_START, low_end), (HOLE_END, HOLE_END + memory_bytes - low_end)]
        .into_iter()
        .filter(|(start, end)| start < end)
}

fn initrd_address(file: &BootFile, kernel: &Kernel, low_end: u64) -> Result<u64, BootError> {
    let bytes = file.bytes.len() as u64;
    if bytes == 0 {
        return Err(BootError::EmptyInitrd(file.name.clone()));
    }
    let end = low_end.min(INITRD_END).min(kernel.initrd_end);
    match end.checked_sub(bytes).map(|at| at & !(PAGE as u64 - 1)) {
        Some(at) if at >= kernel.end => Ok(at),
        _ => Err(BootError::Initrd { file: file.name.clone(), bytes, start: kernel.end, end }),
    }
}

/// The command line with a parameter for each virtio device, and the terminating zero.
fn command_line(text: &str, slots: usize, max: usize) -> Result<Vec<u8>, BootError> {
    if !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(BootError::CommandLineCharacters);
    }
    // The length is checked at the end, so that the message has the whole length.
    let capacity = text.len() + 64 * (slots + 1);
    let build = || {
        let mut line = Cmdline::try_from(text, capacity)?;
        for (slot, irq) in VIRTIO_IRQS.iter().enumerate().take(slots) {
            let at = GuestAddress(VIRTIO_BASE + slot as u64 * VIRTIO_STRIDE);
            line.add_virtio_mmio_device(VIRTIO_SIZE, at, (*irq).into(), None)?;
        }
        line.as_cstring()
    };
    let line = build().map_err(|_: linux_loader::cmdline::Error| BootError::CommandLineCharacters)?;
    let bytes = line.into_bytes_with_nul();
    if bytes.len() > max {
        return Err(BootError::CommandLineLength { bytes: bytes.len() - 1, max: max - 1 });
    }
    Ok(bytes)
}

fn digest(files: &BootFiles, command_line: &[u8]) -> u128 {
    let mut hash = XxHash3_128::new();
    for file in [Some(&files.kernel), files.initrd.as_ref()] {
        hash.write(&file.map_or(0, |file| file.digest().0).to_le_bytes());
    }
    let seed: &[u8] = files.seed.as_ref().map_or(&[], |seed| seed);
    for part in [command_line, seed, &[files.rewrite.into()]] {
        hash.write(&(part.len() as u64).to_le_bytes());
        hash.write(part);
    }
    hash.finish_128()
}

/// PML4, PDPT and four page directories of 2 MiB pages, which map the first 4 GiB to themselves.
fn write_page_tables(ram: &Ram) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let table = |i: u64| PAGE_TABLES + i * PAGE as u64;
    let memory = ram.memory();
    memory.write_obj(table(1) | PRESENT_WRITABLE, GuestAddress(table(0)))?;
    for gib in 0..4 {
        memory.write_obj(table(2 + gib) | PRESENT_WRITABLE, GuestAddress(table(1) + 8 * gib))?;
        for i in 0..512 {
            let page = (gib << 30 | i << 21) | LARGE | PRESENT_WRITABLE;
            memory.write_obj(page, GuestAddress(table(2 + gib) + 8 * i))?;
        }
    }
    Ok(())
}

/// A table with the selectors of the boot protocol: __BOOT_CS 0x10 (64-bit code) and __BOOT_DS 0x18 (data), both flat.
fn write_gdt(ram: &Ram) -> Result<(), GuestMemoryError> {
    let descriptors: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (i, descriptor) in descriptors.into_iter().enumerate() {
        ram.memory().write_obj(descriptor, GuestAddress(GDT + 8 * i as u64))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
