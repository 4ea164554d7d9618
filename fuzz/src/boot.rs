//! The boot loader.

use vmm::ram::Ram;
use vmm::{BootFile, BootFiles, BootPlan, Engine, MachineConfig};

/// Takes any bytes as kernel and initramfs, which must be refused or laid out in RAM.
///
/// # Panics
/// The boot loader panics, or cannot load what it has planned.
pub fn boot(data: &[u8]) {
    let config =
        MachineConfig { engine: Engine::Soft, memory_bytes: 32 << 20, epoch_s: 0, slots: Vec::new() };
    let (initrd, kernel) = data.split_at(data.len().min(data.first().copied().unwrap_or(0) as usize));
    let file = |bytes: &[u8]| BootFile::new("fuzz", bytes.to_vec());
    let initrd = (initrd.len() > 1).then(|| file(initrd));
    let files =
        BootFiles { kernel: file(kernel), initrd, command_line: "x".into(), seed: None, rewrite: false };
    if let Ok(plan) = BootPlan::new(&files, &config) {
        plan.load(&mut Ram::new(config.memory_bytes).unwrap()).unwrap();
    }
}
