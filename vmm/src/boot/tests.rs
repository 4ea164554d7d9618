use super::*;
use crate::vcpu::Engine;
use proptest::prelude::*;

fn config(memory_bytes: u64, slots: usize) -> MachineConfig {
    let slots = vec![crate::config::Slot::Entropy; slots];
    MachineConfig { engine: Engine::Soft, memory_bytes, epoch_s: 0, slots }
}

/// An ELF file with one segment, which has `code` at `at` and takes `memory_size` bytes of memory.
pub(crate) fn elf(at: u64, code: &[u8], memory_size: u64) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[24..32].copy_from_slice(&at.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    file[64..68].copy_from_slice(&1u32.to_le_bytes());
    for (field, value) in [(8, 120), (16, at), (24, at), (32, code.len() as u64), (40, memory_size)] {
        file[64 + field..72 + field].copy_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

/// A bzImage with the bytes of `kernel` after its setup sector. It needs `init_size` bytes at 16 MiB.
fn bzimage(kernel: &[u8], init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    file[0x1f4..0x1f8].copy_from_slice(&(kernel.len() as u32 / 16).to_le_bytes());
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x211] = 1;
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    file.extend_from_slice(kernel);
    file
}

fn files(kernel: Vec<u8>) -> BootFiles {
    let kernel = BootFile::new("k", kernel);
    BootFiles {
        kernel,
        initrd: None,
        command_line: "console=ttyS0".into(),
        seed: Some([7; 32]),
        rewrite: false,
    }
}

fn message(files: &BootFiles, memory_bytes: u64) -> String {
    BootPlan::new(files, &config(memory_bytes, 0)).unwrap_err().to_string()
}

const MIB: u64 = 1 << 20;

#[test]
fn an_elf_kernel_is_laid_out() {
    let mut files = files(elf(2 * MIB, b"code", 64 * 1024));
    files.initrd = Some(BootFile::new("i", vec![9; 5000]));
    let plan = BootPlan::new(&files, &config(32 * MIB, 2)).unwrap();
    let mut ram = Ram::new(32 * MIB).unwrap();
    let start = plan.load(&mut ram).unwrap();
    assert_eq!((start.entry, start.boot_params), (2 * MIB, 0x7000));
    let memory = ram.memory();
    let read = |at| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(2 * MIB)).unwrap(), *b"code");
    let (initrd, size) = (read(0x7218), read(0x721c));
    assert_eq!((initrd as u64, size), (32 * MIB - 8192, 5000));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(initrd as u64 + 4999)).unwrap(), 9);
    let line = "console=ttyS0 virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=512@0xd0001000:6";
    assert_eq!(plan.command_line(), line);
    assert_eq!(read(0x7228), 0x20000);
    assert_eq!(read(0x7250) as u64, SETUP_DATA, "setup_data");
    assert_eq!((read(SETUP_DATA + 8), read(SETUP_DATA + 16)), (9, 0x0707_0707));
    // The memory map: from 0 to the extended BIOS data, and from 1 MiB to the end.
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x71e8)).unwrap(), 2);
    assert_eq!((read(0x72d8), read(0x72e4), read(0x72ec)), (0x9fc00, 0x10_0000, 31 << 20));
    // The page tables map an address of the device windows to itself.
    let directory = PAGE_TABLES + (2 + 3) * 4096;
    let entry = memory.read_obj::<u64>(GuestAddress(directory + 8 * (0xd000_0000 >> 21 & 511))).unwrap();
    assert_eq!(entry, 0xd000_0083);
}

#[test]
fn a_bzimage_is_laid_out() {
    let plan = BootPlan::new(&files(bzimage(&[0xcc; 2048], 1 << 20)), &config(32 * MIB, 0)).unwrap();
    let mut ram = Ram::new(32 * MIB).unwrap();
    let start = plan.load(&mut ram).unwrap();
    assert_eq!(start.entry, 0x100_0200);
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x100_07ff)).unwrap(), 0xcc);
    assert_eq!(ram.memory().read_obj::<u32>(GuestAddress(0x7202)).unwrap(), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x7210)).unwrap(), 0xff);
}

#[test]
fn errors_name_the_file_and_what_is_wrong() {
    let good = elf(2 * MIB, b"code", 64);
    assert!(message(&files(b"hello".to_vec()), 32 * MIB).starts_with("kernel k: it is neither"));
    let truncated = message(&files(good[..good.len() - 1].to_vec()), 32 * MIB);
    assert_eq!(
        truncated,
        "kernel k: it is truncated: a segment should end at byte 124, but the file has 123 bytes"
    );
    assert!(
        message(&files(good[..70].to_vec()), 32 * MIB).contains("the program headers should end at byte 120")
    );
    let mut other = good.clone();
    other[18] = 3;
    assert!(message(&files(other), 32 * MIB).contains("not a little-endian 64-bit x86-64"));
    assert!(message(&files(elf(40 * MIB, b"c", 1)), 32 * MIB).contains("needs memory from 0x2800000"));
    assert!(message(&files(elf(0x7000, b"c", 1)), 32 * MIB).contains("needs memory from 0x7000"));
    assert!(message(&files(elf(u64::MAX - 4, b"c", 16)), 32 * MIB).contains("needs memory"));
    let mut entry = good.clone();
    entry[24] = 99;
    assert!(message(&files(entry), 32 * MIB).contains("entry point 0x200063 is outside"));

    let mut old = bzimage(&[0; 16], 4096);
    old[0x206] = 0x0b;
    assert!(message(&files(old), 32 * MIB).contains("protocol 0x20b"));
    let mut short = bzimage(&[0; 1600], 4096);
    short.truncate(2000);
    assert!(message(&files(short), 32 * MIB).contains("the compressed kernel should end at byte 2624"));
    assert!(message(&files(bzimage(&[0; 16], 64 << 20)), 32 * MIB).contains("give the guest more memory"));

    let mut initrd = files(good);
    initrd.initrd = Some(BootFile::new("cpio", vec![0; 31 << 20]));
    assert!(message(&initrd, 32 * MIB).starts_with("initrd cpio: 32505856 bytes do not fit"));
    initrd.initrd = Some(BootFile::new("cpio", vec![]));
    assert!(message(&initrd, 32 * MIB).starts_with("initrd cpio: the file is empty"));
    initrd.initrd = None;
    initrd.command_line = "x".repeat(2048);
    assert!(message(&initrd, 32 * MIB).starts_with("cmdline: it has 2048 bytes"));
    initrd.command_line = "a\nb".into();
    assert!(message(&initrd, 32 * MIB).contains("printable"));
}

#[test]
fn the_digest_covers_everything_that_is_booted() {
    let plan = |change: &dyn Fn(&mut BootFiles)| {
        let mut files = files(elf(2 * MIB, b"code", 64));
        change(&mut files);
        BootPlan::new(&files, &config(32 * MIB, 0)).unwrap().digest()
    };
    let changes: [&dyn Fn(&mut BootFiles); 5] = [
        &|_| (),
        &|files| files.kernel = BootFile::new("k", elf(2 * MIB, b"codf", 64)),
        &|files| files.initrd = Some(BootFile::new("i", vec![1])),
        &|files| files.command_line.push('x'),
        &|files| files.seed = None,
    ];
    let mut digests: Vec<u128> = changes.iter().map(|change| plan(change)).collect();
    assert_eq!(plan(&|files| files.kernel.name = "other".into()), digests[0]);
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(digests.len(), changes.len());
}

proptest! {
    /// Whatever a file contains, it is refused or loads.
    #[test]
    fn damaged_kernels_are_refused_or_load(
        is_elf in any::<bool>(), damage in prop::collection::vec((0usize..700, any::<u8>()), 0..12), cut in 0usize..2000,
    ) {
        let mut file = if is_elf { elf(2 * MIB, &[0; 600], 4096) } else { bzimage(&[0; 64], 4096) };
        for (at, value) in damage {
            let at = at % file.len();
            file[at] = value;
        }
        file.truncate(cut.max(1));
        if let Ok(plan) = BootPlan::new(&files(file), &config(32 * MIB, 0)) {
            plan.load(&mut Ram::new(32 * MIB).unwrap()).unwrap();
        }
    }
}
