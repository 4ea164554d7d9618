//! What kind of kernel a file is, where it goes, and what is wrong with it. linux-loader copies it; what it would
//! refuse without saying why, or accept and write over something, is found here.

use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::elf::{EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::ByteValued;

use super::HIGH_START;

const EM_X86_64: u16 = 62;
/// Offset of the setup header in a bzImage.
const HEADER_AT: usize = 0x1f1;
/// A bzImage's 64-bit entry lies this far into its protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Segments beyond this are nobody's kernel.
const SEGMENTS_MAX: u16 = 128;

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Neither format.
    #[error("is neither an ELF vmlinux nor a bzImage")]
    Unknown,
    /// The file ends early.
    #[error("is truncated: {what} needs {needs} bytes, the file has {has}")]
    Truncated {
        /// Whose bytes are missing.
        what: &'static str,
        /// The size the file should have at least.
        needs: u64,
        /// The size that it has.
        has: u64,
    },
    /// An ELF file for something else.
    #[error("is an ELF file, but not a little-endian 64-bit x86-64 one")]
    OtherMachine,
    /// An ELF header that makes no sense.
    #[error("has a wrong ELF header: {0}")]
    Header(&'static str),
    /// A segment that is not in memory.
    #[error(
        "wants memory from {start:#x} to {end:#x}, the guest has {HIGH_START:#x} to {limit:#x}; give it more"
    )]
    OutsideMemory {
        /// Start of a segment.
        start: u64,
        /// Its end.
        end: u64,
        /// End of the guest's memory.
        limit: u64,
    },
    /// The entry is in no segment.
    #[error("has its entry {0:#x} outside of what it loads")]
    Entry(u64),
    /// An old bzImage.
    #[error(
        "is a bzImage without a 64-bit entry (boot protocol {version:#x}, 2.12 and XLF_KERNEL_64 are needed)"
    )]
    No64BitEntry {
        /// Boot protocol version.
        version: u16,
    },
    /// linux-loader refused it all the same.
    #[error("cannot be loaded: {0}")]
    Loader(linux_loader::loader::Error),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Format {
    Elf,
    BzImage(setup_header),
}

/// A kernel that fits, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub format: Format,
    /// Where a bzImage's protected-mode part goes; the first segment of an ELF file.
    pub start: u64,
    /// End of all that it uses before it has read the memory map.
    pub end: u64,
    /// RIP.
    pub entry: u64,
    /// Highest end of an initramfs.
    pub initrd_end: u64,
    /// Bytes of command line with the terminating zero.
    pub command_line_max: usize,
}

impl Kernel {
    pub fn parse(file: &[u8], memory_end: u64) -> Result<Kernel, KernelError> {
        if file.starts_with(b"\x7fELF") {
            parse_elf(file, memory_end)
        } else if file.get(0x202..0x206) == Some(b"HdrS") {
            parse_bzimage(file, memory_end)
        } else {
            Err(KernelError::Unknown)
        }
    }
}

/// A structure at an offset of the file.
fn read<T: ByteValued + Default>(file: &[u8], at: u64, what: &'static str) -> Result<T, KernelError> {
    let needs = at.saturating_add(size_of::<T>() as u64);
    let has = file.len() as u64;
    if needs > has {
        return Err(KernelError::Truncated { what, needs, has });
    }
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(&file[at as usize..needs as usize]);
    Ok(value)
}

/// A section of an ELF file that is in the file.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub name: String,
    /// Linear address.
    pub address: u64,
    /// Where in the file, bytes.
    pub offset: usize,
    pub len: usize,
    pub executable: bool,
}

/// Size of `Elf64_Shdr`.
const SECTION_HEADER: usize = 64;
const SHT_NOBITS: u32 = 8;
const SHF_EXECINSTR: u64 = 4;

/// The sections of an ELF file, if that is what it is and they are whole.
pub(super) fn sections(file: &[u8]) -> Option<Vec<Section>> {
    let header: Elf64_Ehdr = read(file, 0, "the ELF header").ok()?;
    if !file.starts_with(b"\x7fELF") || header.e_shentsize as usize != SECTION_HEADER || header.e_shnum == 0 {
        return None;
    }
    let headers: Vec<&[u8; SECTION_HEADER]> = (0..header.e_shnum as usize)
        .map(|n| file.get(usize::try_from(header.e_shoff).ok()? + n * SECTION_HEADER..)?.first_chunk())
        .collect::<Option<_>>()?;
    let word =
        |h: &[u8; SECTION_HEADER], at: usize| u32::from_le_bytes(*h[at..].first_chunk().unwrap_or(&[0; 4]));
    let long =
        |h: &[u8; SECTION_HEADER], at: usize| u64::from_le_bytes(*h[at..].first_chunk().unwrap_or(&[0; 8]));
    let names = headers.get(header.e_shstrndx as usize)?;
    let names = file.get(long(names, 24) as usize..)?;
    let section = |h: &&[u8; SECTION_HEADER]| {
        let name = names.get(word(h, 0) as usize..)?.split(|b| *b == 0).next()?;
        Some(Section {
            name: String::from_utf8_lossy(name).into_owned(),
            address: long(h, 16),
            offset: long(h, 24) as usize,
            len: long(h, 32) as usize,
            executable: long(h, 8) & SHF_EXECINSTR != 0,
        })
    };
    let in_file = |s: &Section| s.offset.checked_add(s.len).is_some_and(|end| end <= file.len());
    let sections = headers.iter().filter(|h| word(h, 4) != SHT_NOBITS).map(section);
    let sections: Vec<_> = sections.collect::<Option<_>>()?;
    sections.iter().all(in_file).then_some(sections)
}

fn check_memory(start: u64, end: u64, limit: u64) -> Result<(), KernelError> {
    if start < HIGH_START || end > limit || start > end {
        return Err(KernelError::OutsideMemory { start, end, limit });
    }
    Ok(())
}

fn parse_elf(file: &[u8], memory_end: u64) -> Result<Kernel, KernelError> {
    let header: Elf64_Ehdr = read(file, 0, "the ELF header")?;
    let ident = header.e_ident;
    let class_and_data = (ident[EI_CLASS] as u32, ident[EI_DATA] as u32);
    if class_and_data != (ELFCLASS64 as u32, ELFDATA2LSB as u32) || header.e_machine != EM_X86_64 {
        return Err(KernelError::OtherMachine);
    }
    if header.e_phentsize as usize != size_of::<Elf64_Phdr>() {
        return Err(KernelError::Header("size of program headers"));
    }
    if header.e_phnum == 0 || header.e_phnum > SEGMENTS_MAX {
        return Err(KernelError::Header("number of program headers"));
    }
    if header.e_phoff < size_of::<Elf64_Ehdr>() as u64 {
        return Err(KernelError::Header("offset of program headers"));
    }
    let (mut start, mut end, mut has_entry) = (u64::MAX, 0, false);
    for i in 0..header.e_phnum as u64 {
        let at = header.e_phoff.saturating_add(i * size_of::<Elf64_Phdr>() as u64);
        let segment: Elf64_Phdr = read(file, at, "the program headers")?;
        if segment.p_type != PT_LOAD {
            continue;
        }
        let needs = segment.p_offset.saturating_add(segment.p_filesz);
        let has = file.len() as u64;
        if needs > has {
            return Err(KernelError::Truncated { what: "a segment", needs, has });
        }
        if segment.p_filesz > segment.p_memsz {
            return Err(KernelError::Header("a segment is larger in the file than in memory"));
        }
        let segment_end = segment.p_paddr.saturating_add(segment.p_memsz);
        check_memory(segment.p_paddr, segment_end, memory_end)?;
        has_entry |= (segment.p_paddr..segment.p_paddr + segment.p_filesz).contains(&header.e_entry);
        start = start.min(segment.p_paddr);
        end = end.max(segment_end);
    }
    if !has_entry {
        return Err(KernelError::Entry(header.e_entry));
    }
    Ok(Kernel {
        format: Format::Elf,
        start,
        end,
        entry: header.e_entry,
        initrd_end: u64::MAX,
        command_line_max: usize::MAX,
    })
}

fn parse_bzimage(file: &[u8], memory_end: u64) -> Result<Kernel, KernelError> {
    let header: setup_header = read(file, HEADER_AT as u64, "the setup header")?;
    let version = header.version;
    if version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 || header.loadflags & 1 == 0 {
        return Err(KernelError::No64BitEntry { version });
    }
    // In units of 16 bytes; the header knows how much of the file is kernel.
    let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects as u64 };
    let needs = (sectors + 1) * 512 + header.syssize as u64 * 16;
    let has = file.len() as u64;
    // The last unit may be cut by the signature's alignment.
    if has + 15 < needs || header.syssize == 0 {
        return Err(KernelError::Truncated { what: "the compressed kernel", needs, has });
    }
    let start = header.pref_address;
    let in_file = has.saturating_sub((sectors + 1) * 512);
    let size = (header.init_size as u64).max(in_file);
    let end = start.saturating_add(size);
    check_memory(start, end, memory_end)?;
    Ok(Kernel {
        format: Format::BzImage(header),
        start,
        end,
        entry: start + ENTRY_64,
        initrd_end: header.initrd_addr_max as u64 + 1,
        command_line_max: header.cmdline_size as usize + 1,
    })
}
