//! The kernel command line.

use core::fmt;
use core::net::Ipv4Addr;
use core::str::FromStr;

/// At most this many `virtio_mmio.device=` words are kept.
pub const DEVICES_MAX: usize = 8;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Network services.
    Serve,
    /// Print a line and power off.
    Hello,
    /// Integer loop with conditional branches.
    Spin,
    /// Rewrite an area of memory.
    Mem,
    /// Write a disk and read it back.
    Disk,
    /// Print random words.
    Random,
    /// Panic.
    Panic,
}

/// A virtio-mmio device as `virtio_mmio.device=SIZE@BASE:IRQ` names it; the size is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Physical address of its registers.
    pub base: u64,
    /// Its line on the PIC pair, 0 to 15.
    pub irq: u32,
}

/// The guest's address on its network, from `ip=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The guest's own address.
    pub own: Ipv4Addr,
    /// Default router.
    pub gateway: Option<Ipv4Addr>,
    /// Length of the netmask in bits; 24 without one.
    pub prefix_len: u8,
}

/// The command line, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// `workload=`.
    pub workload: Workload,
    /// `ip=`.
    pub address: Option<Address>,
    /// `virtio_mmio.device=`, in the order given.
    pub devices: [Option<Device>; DEVICES_MAX],
    /// `count=`.
    pub count: Option<u64>,
    /// `every=`, not 0.
    pub every: u64,
    /// `mib=`.
    pub mib: u64,
    /// `seed=`.
    pub seed: u64,
    /// `hz=`, 19 (the slowest a 16-bit PIT can do) to 1000.
    pub hz: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            workload: Workload::Serve,
            address: None,
            devices: [None; DEVICES_MAX],
            count: None,
            every: 1 << 24,
            mib: 16,
            seed: 1,
            hz: 100,
        }
    }
}

/// A word of the command line whose value cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadWord<'a>(pub &'a str);

impl fmt::Display for BadWord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "command line: cannot use `{}`", self.0)
    }
}

impl Options {
    /// Parses a command line.
    ///
    /// # Errors
    /// The first word with a known name and a value that cannot be used.
    pub fn parse(line: &str) -> Result<Self, BadWord<'_>> {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            if let Some((name, value)) = word.split_once('=') {
                options.set(name, value).ok_or(BadWord(word))?;
            }
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "workload" => self.workload = workload(value)?,
            "ip" => self.address = address(value)?,
            "virtio_mmio.device" => {
                *self.devices.iter_mut().find(|slot| slot.is_none())? = Some(device(value)?);
            }
            "count" => self.count = Some(number(value)?),
            "every" => self.every = number(value).filter(|&every| every > 0)?,
            "mib" => self.mib = number(value)?,
            "seed" => self.seed = number(value)?,
            "hz" => self.hz = number(value).filter(|hz| (19..=1000).contains(hz))? as u32,
            _ => {}
        }
        Some(())
    }
}

fn workload(value: &str) -> Option<Workload> {
    Some(match value {
        "serve" => Workload::Serve,
        "hello" => Workload::Hello,
        "spin" => Workload::Spin,
        "mem" => Workload::Mem,
        "disk" => Workload::Disk,
        "random" => Workload::Random,
        "panic" => Workload::Panic,
        _ => return None,
    })
}

/// `own:server:gateway:netmask:hostname:device:autoconf`. Outer `None`: malformed; inner: no address is wanted.
fn address(value: &str) -> Option<Option<Address>> {
    let mut fields = value.split(':');
    let own = fields.next()?;
    if matches!(own, "" | "off" | "none") {
        return Some(None);
    }
    let gateway = optional(fields.nth(1))?;
    let netmask = optional::<Ipv4Addr>(fields.next())?.map_or(!0 << 8, u32::from);
    if netmask.leading_ones() + netmask.trailing_zeros() < 32 {
        return None;
    }
    Some(Some(Address { own: own.parse().ok()?, gateway, prefix_len: netmask.leading_ones() as u8 }))
}

/// A field that may be missing or empty.
fn optional<T: FromStr>(field: Option<&str>) -> Option<Option<T>> {
    match field {
        None | Some("") => Some(None),
        Some(text) => text.parse().ok().map(Some),
    }
}

fn device(value: &str) -> Option<Device> {
    let (_size, place) = value.split_once('@')?;
    let mut fields = place.split(':');
    let base = number(fields.next()?)?;
    let irq = number(fields.next()?).filter(|&irq| irq < 16)? as u32;
    Some(Device { base, irq })
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_line() {
        let line = "console=ttyS0 quiet ip=10.0.0.2::10.0.0.1:255.255.255.0::eth0:off \
                    virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 workload=mem count=3 mib=0x20 hz=1000";
        let options = Options::parse(line).unwrap();
        let own = Ipv4Addr::new(10, 0, 0, 2);
        let address = Address { own, gateway: Some(Ipv4Addr::new(10, 0, 0, 1)), prefix_len: 24 };
        let mut devices = [None; DEVICES_MAX];
        devices[0] = Some(Device { base: 0xd000_0000, irq: 5 });
        devices[1] = Some(Device { base: 0xd000_1000, irq: 6 });
        assert_eq!(
            options,
            Options {
                workload: Workload::Mem,
                address: Some(address),
                devices,
                count: Some(3),
                mib: 32,
                hz: 1000,
                ..Options::default()
            }
        );
    }

    #[test]
    fn an_address_may_be_short_or_off() {
        let address = |line| Options::parse(line).unwrap().address;
        let own = Ipv4Addr::new(192, 168, 7, 9);
        assert_eq!(address("ip=192.168.7.9"), Some(Address { own, gateway: None, prefix_len: 24 }));
        assert_eq!(
            address("ip=192.168.7.9:::255.255.0.0"),
            Some(Address { own, gateway: None, prefix_len: 16 })
        );
        assert_eq!(address("ip=off"), None);
        assert_eq!(address(""), None);
    }

    #[test]
    fn bad_values_are_named() {
        for word in [
            "ip=10.0.0",
            "ip=10.0.0.2:::255.0.255.0",
            "virtio_mmio.device=512@0xd0000000",
            "virtio_mmio.device=512@0xd0000000:16",
            "workload=sing",
            "count=-1",
            "every=0",
            "hz=18",
            "hz=1001",
        ] {
            assert_eq!(Options::parse(word), Err(BadWord(word)));
        }
    }
}
