//! The configuration of a machine: plain data, and part of what both sides of a pair must have in common.

use serde::{Deserialize, Serialize};

use crate::vcpu::Engine;

/// The largest possible number of virtio devices.
pub const SLOTS_MAX: usize = 8;
/// Guest-physical address of the first virtio register window; the others follow.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Distance between two windows.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Bytes of a window in which the device answers.
pub const VIRTIO_SIZE: u64 = 0x200;
/// Interrupt line of the device in each slot.
pub const VIRTIO_IRQS: [u8; SLOTS_MAX] = [5, 6, 9, 10, 11, 12, 14, 15];

/// Configuration of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// The engine that executes the guest.
    pub engine: Engine,
    /// RAM in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// The time that the real-time clock shows at guest time 0, in seconds since 1970.
    pub epoch_s: i64,
    /// The virtio devices, in the order of their slots.
    pub slots: Vec<Slot>,
}

/// Configuration of a virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    /// A network device.
    Net {
        /// The guest's MAC address.
        mac: [u8; 6],
    },
    /// A disk.
    Disk {
        /// Size in bytes, a multiple of 512.
        bytes: u64,
        /// Writes by the guest fail.
        read_only: bool,
    },
    /// A source of random numbers.
    Entropy,
    /// A console.
    Console,
}

/// The configuration is wrong. The message names the field.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The size of RAM.
    #[error("memory: {0} bytes is not a multiple of 4096 between 16 MiB and 1 TiB")]
    Memory(u64),
    /// The number of virtio devices.
    #[error("devices: {0} virtio devices are configured, at most {SLOTS_MAX} are possible")]
    Slots(usize),
    /// The size of a disk.
    #[error("disk in slot {slot}: {bytes} bytes is not a positive multiple of 512")]
    Disk {
        /// Number of its slot.
        slot: usize,
        /// Size of the disk.
        bytes: u64,
    },
    /// The MAC address of the network device in a slot.
    #[error("mac of the network device in slot {0}: a multicast address cannot be the address of a device")]
    Mac(usize),
}

/// How many bytes of RAM a machine may have.
pub const MEMORY_BYTES: std::ops::RangeInclusive<u64> = 16 << 20..=1 << 40;

/// Whether a MAC address may be that of one station: it is not a multicast address.
pub fn is_station(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0
}

impl MachineConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !self.memory_bytes.is_multiple_of(4096) || !MEMORY_BYTES.contains(&self.memory_bytes) {
            return Err(ConfigError::Memory(self.memory_bytes));
        }
        if self.slots.len() > SLOTS_MAX {
            return Err(ConfigError::Slots(self.slots.len()));
        }
        for (slot, device) in self.slots.iter().enumerate() {
            match *device {
                Slot::Disk { bytes, .. } if bytes == 0 || !bytes.is_multiple_of(512) => {
                    return Err(ConfigError::Disk { slot, bytes });
                }
                Slot::Net { mac } if !is_station(mac) => return Err(ConfigError::Mac(slot)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// What both sides of a pair, or a saved machine and the machine that continues it, must have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineIdentity {
    /// Raised whenever the same inputs may lead to another state.
    pub machine_version: u32,
    /// Configuration of the machine.
    pub config: MachineConfig,
    /// Digest of kernel, initramfs, command line and seed.
    pub boot: u128,
}

impl MachineIdentity {
    /// The first field in which two identities differ.
    pub fn difference(&self, other: &MachineIdentity) -> Option<&'static str> {
        let (a, b) = (&self.config, &other.config);
        [
            ("machine version", self.machine_version == other.machine_version),
            // Engines of the same name continue each other's machines.
            ("engine", a.engine.name() == b.engine.name()),
            ("memory", a.memory_bytes == b.memory_bytes),
            ("clock epoch", a.epoch_s == b.epoch_s),
            ("devices", a.slots == b.slots),
            ("kernel, initramfs, command line or seed", self.boot == other.boot),
        ]
        .into_iter()
        .find_map(|(name, same)| (!same).then_some(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig { engine: Engine::Soft, memory_bytes: 64 << 20, epoch_s: 0, slots: Vec::new() }
    }

    #[test]
    fn errors_name_the_field() {
        let wrong = |change: fn(&mut MachineConfig)| {
            let mut config = config();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(config().validate(), Ok(()));
        assert!(wrong(|c| c.memory_bytes += 1).starts_with("memory: 67108865"));
        assert!(wrong(|c| c.slots = vec![Slot::Entropy; 9]).contains("9 virtio"));
        assert!(
            wrong(|c| c.slots = vec![Slot::Disk { bytes: 100, read_only: false }])
                .starts_with("disk in slot 0")
        );
        assert!(
            wrong(|c| c.slots = vec![Slot::Entropy, Slot::Net { mac: [1, 0, 0, 0, 0, 0] }])
                .contains("slot 1")
        );
    }

    #[test]
    fn identities_name_their_difference() {
        let one = MachineIdentity { machine_version: 1, config: config(), boot: 7 };
        assert_eq!(one.difference(&one.clone()), None);
        let mut other = one.clone();
        other.config.epoch_s = 1;
        assert_eq!(one.difference(&other), Some("clock epoch"));
        other.config.memory_bytes = 0;
        assert_eq!(one.difference(&other), Some("memory"));
    }
}
