//! Checks of a kernel file: its format, where it goes in RAM, and what is wrong with it. linux-loader copies it; this module
//! finds what linux-loader would refuse without giving a reason, or would load over something else.

use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::elf::{EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::ByteValued;

/// Lowest guest-physical address at which a kernel may lie.
pub(super) const HIGH_START: u64 = 0x10_0000;
const EM_X86_64: u16 = 62;
/// Offset of the setup header in a bzImage.
const HEADER_AT: usize = 0x1f1;
/// Offset of the 64-bit entry in the protected-mode part of a bzImage.
const ENTRY_64: u64 = 0x200;
/// No kernel has more segments than this.
const SEGMENTS_MAX: u16 = 128;

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file has neither format.
    #[error("it is neither an ELF vmlinux nor a bzImage")]
    Unknown,
    /// The file ends too early.
    #[error("it is truncated: {what} should end at byte {needs}, but the file has {has} bytes")]
    Truncated {
        /// The part whose bytes are missing.
        what: &'static str,
        /// The least size that the file must have.
        needs: u64,
        /// The size of the file.
        has: u64,
    },
    /// The ELF file is for another kind of machine.
    #[error("it is an ELF file, but not a little-endian 64-bit x86-64 one")]
    OtherMachine,
    /// A field of the ELF headers is wrong.
    #[error("its ELF headers are wrong: {0}")]
    Header(&'static str),
    /// A segment lies outside of the guest's memory.
    #[error(
        "it needs memory from {start:#x} to {end:#x}, but the guest has {HIGH_START:#x} to {limit:#x}; give the guest more memory"
    )]
    OutsideMemory {
        /// Start of the segment.
        start: u64,
        /// End of the segment.
        end: u64,
        /// End of the guest's memory.
        limit: u64,
    },
    /// The entry point is in none of the segments.
    #[error("its entry point {0:#x} is outside of its segments")]
    Entry(u64),
    /// The bzImage is too old, or a 32-bit one.
    #[error(
        "it is a bzImage without a 64-bit entry (boot protocol {version:#x}; 0x20c and XLF_KERNEL_64 are needed)"
    )]
    No64BitEntry {
        /// Version of the boot protocol.
        version: u16,
    },
    /// linux-loader refused a file that passed the checks.
    #[error("it cannot be loaded: {0}")]
    Loader(linux_loader::loader::Error),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum KernelFormat {
    Elf,
    BzImage(setup_header),
}

/// A kernel that fits into RAM, and where it goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub format: KernelFormat,
    /// Start of a bzImage's protected-mode part, or of an ELF file's lowest segment.
    pub start: u64,
    /// End of the memory that the kernel uses before it has read the memory map.
    pub end: u64,
    /// Entry point: the first RIP.
    pub entry: u64,
    /// Highest possible end of an initramfs.
    pub initrd_end: u64,
    /// Longest command line with its terminating zero, bytes.
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

/// Reads a structure at an offset of the file.
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

/// A section of an ELF file whose content is in the file.
#[derive(Clone, Debug)]
pub(super) struct ElfSection {
    pub name: String,
    /// Linear address.
    pub address: u64,
    /// Offset in the file, bytes.
    pub offset: usize,
    pub len: usize,
    pub executable: bool,
}

/// Size of `Elf64_Shdr`.
const SECTION_HEADER: usize = 64;
const SHT_NOBITS: u32 = 8;
const SHF_EXECINSTR: u64 = 4;

/// The sections of an ELF file. `None` if the file is not an ELF file or a section is not completely in it.
pub(super) fn sections(file: &[u8]) -> Option<Vec<ElfSection>> {
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
        Some(ElfSection {
            name: String::from_utf8_lossy(name).into_owned(),
            address: long(h, 16),
            offset: long(h, 24) as usize,
            len: long(h, 32) as usize,
            executable: long(h, 8) & SHF_EXECINSTR != 0,
        })
    };
    let in_file = |s: &ElfSection| s.offset.checked_add(s.len).is_some_and(|end| end <= file.len());
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
        return Err(KernelError::Header("the size of a program header"));
    }
    if header.e_phnum == 0 || header.e_phnum > SEGMENTS_MAX {
        return Err(KernelError::Header("the number of program headers"));
    }
    if header.e_phoff < size_of::<Elf64_Ehdr>() as u64 {
        return Err(KernelError::Header("the offset of the program headers"));
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
        format: KernelFormat::Elf,
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
    // `syssize` counts units of 16 bytes.
    let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects as u64 };
    let needs = (sectors + 1) * 512 + header.syssize as u64 * 16;
    let has = file.len() as u64;
    // The alignment of a signature may have cut the last unit.
    if has + 15 < needs || header.syssize == 0 {
        return Err(KernelError::Truncated { what: "the compressed kernel", needs, has });
    }
    let start = header.pref_address;
    let in_file = has.saturating_sub((sectors + 1) * 512);
    let size = (header.init_size as u64).max(in_file);
    let end = start.saturating_add(size);
    check_memory(start, end, memory_end)?;
    Ok(Kernel {
        format: KernelFormat::BzImage(header),
        start,
        end,
        entry: start + ENTRY_64,
        initrd_end: header.initrd_addr_max as u64 + 1,
        command_line_max: header.cmdline_size as usize + 1,
    })
}
