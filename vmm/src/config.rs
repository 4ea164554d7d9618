//! What a machine is made of: plain data, part of what both sides of a pair must share.

use serde::{Deserialize, Serialize};

use crate::vcpu::Engine;

/// At most this many virtio devices.
pub const SLOTS_MAX: usize = 8;
/// Guest-physical address of the first virtio window; the others follow.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Distance between two windows.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Bytes of a window that a device answers in.
pub const VIRTIO_SIZE: u64 = 0x200;
/// Interrupt line of each slot.
pub const VIRTIO_IRQS: [u8; SLOTS_MAX] = [5, 6, 9, 10, 11, 12, 14, 15];

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// What executes the guest.
    pub engine: Engine,
    /// RAM in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// What the real-time clock shows at guest time 0, in seconds since 1970.
    pub epoch_s: i64,
    /// The virtio devices, in the order of their slots.
    pub slots: Vec<Slot>,
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    /// Network.
    Net {
        /// The guest's MAC address.
        mac: [u8; 6],
    },
    /// Disk.
    Disk {
        /// Size in bytes, a multiple of 512.
        bytes: u64,
        /// Writes fail.
        read_only: bool,
    },
    /// Random numbers.
    Entropy,
    /// Console.
    Console,
}

/// The configuration is wrong; the message names the field.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// RAM.
    #[error("memory: {0} bytes is not a multiple of 4096 between 16 MiB and 1 TiB")]
    Memory(u64),
    /// Devices.
    #[error("devices: {0} virtio devices, at most {SLOTS_MAX} are possible")]
    Slots(usize),
    /// A disk.
    #[error("disk in slot {slot}: {bytes} bytes is not a positive multiple of 512")]
    Disk {
        /// Which.
        slot: usize,
        /// Its size.
        bytes: u64,
    },
    /// A network device.
    #[error("mac of the network device in slot {0}: a multicast address cannot be a device's own")]
    Mac(usize),
}

/// How much RAM a machine may have, bytes.
pub const MEMORY_BYTES: std::ops::RangeInclusive<u64> = 16 << 20..=1 << 40;

/// A MAC address that a station may have: none of a group.
pub fn is_station(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0
}

impl MachineConfig {
    /// Checks every field.
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

/// What both sides of a pair, or a saved machine and the one that continues it, must share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineIdentity {
    /// Changes when the same inputs may give another state.
    pub machine_version: u32,
    /// The machine.
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
            // Engines of one name go on where the other was.
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
