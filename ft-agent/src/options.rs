//! The options of a machine, from flags or from a TOML file: one structure for both.
//!
//! A flag wins over the file. [`RunOptions::check`] turns the options into a [`GuestPlan`], or says which field is wrong.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use vmm::config::{MEMORY_BYTES, is_station};

use crate::engine::{self, CpuChoice, PositionsChoice};
use crate::error::Error;
use crate::images::{self, BundledGuest};

/// Where guest time comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockMode {
    /// Guest time follows the host's clock.
    #[default]
    Host,
    /// Guest time follows the executed instructions and skips idle waits. Nothing from the host enters the guest:
    /// the real-time clock starts at 2000-01-01, and entropy is a fixed stream.
    Virtual,
}

/// Options of the machine and of the host devices around it. Every field is optional, in a file and on the command line.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunOptions {
    /// Read options from this TOML file; flags take precedence over it
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Run one of vmft's own guests (built by guest-images/build)
    #[arg(long, value_enum)]
    pub guest: Option<BundledGuest>,
    /// Kernel to boot: a bzImage or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; with --guest it is appended to that guest's own
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Guest RAM in MiB [default: 256]
    #[arg(long, value_name = "MIB")]
    pub memory_mib: Option<u64>,
    /// Engine that executes the guest [default: auto]
    #[arg(long, value_enum)]
    pub cpu: Option<CpuChoice>,
    /// What positions count with --cpu kvm [default: auto]
    #[arg(long, value_enum)]
    pub positions: Option<PositionsChoice>,
    /// With --cpu kvm: report a guest that makes no exit for this long while an input waits [default: 1000]
    #[arg(long, value_name = "MS")]
    pub starvation_ms: Option<u64>,
    /// Clock of the guest [default: host; virtual with --stop-at, --digest-at or --save-at]
    #[arg(long, value_enum)]
    pub clock: Option<ClockMode>,
    /// Connect the guest's network to this tap, which is created if it does not exist
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,
    /// MAC address of the guest; needs --tap [default: 02:76:6d:66:74:01]
    #[arg(long, value_name = "MAC")]
    pub mac: Option<String>,
    /// IPv4 address of the guest; becomes ip= on the kernel command line
    #[arg(long, value_name = "ADDRESS/PREFIX[,GATEWAY]")]
    pub ip: Option<String>,
    /// Raw disk image, read-only with ,ro; may be given several times
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    pub disks: Vec<String>,
}

/// A disk of the guest: the image file and how it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image file.
    pub path: PathBuf,
    /// The guest may not write to it.
    pub read_only: bool,
}

/// The guest's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Name of the tap.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
}

/// The checked options: what to boot, and which host devices the machine gets.
#[derive(Clone, Debug)]
pub struct GuestPlan {
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initial RAM disk file.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, without what the machine adds for its devices.
    pub cmdline: String,
    /// Guest RAM, bytes.
    pub memory: u64,
    /// Engine that executes the guest.
    pub engine: vmm::Engine,
    /// How long the guest may make no exit while an input waits before that is reported.
    pub starvation: Duration,
    /// Clock, if one is given.
    pub clock: Option<ClockMode>,
    /// Network, if any.
    pub net: Option<NetConfig>,
    /// Disks, in the order of their slots.
    pub disks: Vec<DiskConfig>,
}

const STARVATION_MS_DEFAULT: u64 = 1000;
const MEMORY_MIB_DEFAULT: u64 = 256;
/// Locally administered; "vmft" in ASCII and a number.
const MAC_DEFAULT: [u8; 6] = [0x02, 0x76, 0x6d, 0x66, 0x74, 0x01];

impl RunOptions {
    /// Checks the options, together with those of the file that `config` names.
    ///
    /// # Errors
    /// [`Error::Config`] names the field.
    pub fn check(self) -> Result<GuestPlan, Error> {
        let o = match &self.config {
            Some(path) => {
                let file = read_file(path)?;
                self.over(file)
            }
            None => self,
        };
        let images = o.guest.map(images::find).transpose()?;
        let images = images.unwrap_or_default();
        let kernel = o.kernel.or(images.kernel);
        let memory_mib = o.memory_mib.unwrap_or(MEMORY_MIB_DEFAULT);
        let (least, most) = (MEMORY_BYTES.start() >> 20, MEMORY_BYTES.end() >> 20);
        if !(least..=most).contains(&memory_mib) {
            let why = format!("{memory_mib} MiB is not in the range {least} to {most}");
            return Err(Error::config("memory-mib", why));
        }
        let ip = o.ip.as_deref().map(ip_argument).transpose()?;
        let cmdline = [images.cmdline, o.cmdline, ip].into_iter().flatten().collect::<Vec<_>>().join(" ");
        let mac = o.mac.as_deref().map(parse_mac).transpose()?;
        if mac.is_some() && o.tap.is_none() {
            return Err(Error::config(
                "mac",
                "the guest has no network: give --tap NAME, or leave --mac out",
            ));
        }
        Ok(GuestPlan {
            kernel: kernel.ok_or_else(|| {
                Error::config(
                    "kernel",
                    "no kernel is given: give --kernel FILE, --guest linux or --guest bare",
                )
            })?,
            initrd: o.initrd.or(images.initrd),
            cmdline,
            memory: memory_mib << 20,
            engine: engine::choose(o.cpu.unwrap_or_default(), o.positions.unwrap_or_default())?,
            starvation: Duration::from_millis(o.starvation_ms.unwrap_or(STARVATION_MS_DEFAULT)),
            clock: o.clock,
            net: o.tap.map(|tap| check_tap(tap, mac.unwrap_or(MAC_DEFAULT))).transpose()?,
            disks: o.disks.iter().map(|d| d.parse()).collect::<Result<_, _>>()?,
        })
    }

    /// These options; what they lack is taken from `file`.
    pub fn over(self, file: RunOptions) -> RunOptions {
        RunOptions {
            config: None,
            guest: self.guest.or(file.guest),
            kernel: self.kernel.or(file.kernel),
            initrd: self.initrd.or(file.initrd),
            cmdline: self.cmdline.or(file.cmdline),
            memory_mib: self.memory_mib.or(file.memory_mib),
            cpu: self.cpu.or(file.cpu),
            positions: self.positions.or(file.positions),
            starvation_ms: self.starvation_ms.or(file.starvation_ms),
            clock: self.clock.or(file.clock),
            tap: self.tap.or(file.tap),
            mac: self.mac.or(file.mac),
            ip: self.ip.or(file.ip),
            disks: if self.disks.is_empty() { file.disks } else { self.disks },
        }
    }
}

fn read_file(path: &Path) -> Result<RunOptions, Error> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::config("config", format!("cannot read {}: {e}", path.display())))?;
    toml::from_str(&text).map_err(|e| Error::config("config", format!("cannot read {}: {e}", path.display())))
}

fn parse_mac(text: &str) -> Result<[u8; 6], Error> {
    let parts: Vec<_> =
        text.split(':').map(|p| u8::from_str_radix(p, 16)).collect::<Result<_, _>>().unwrap_or_default();
    let mac = <[u8; 6]>::try_from(parts).map_err(|_| {
        Error::config(
            "mac",
            format!("{text:?} is not a MAC address: give six hexadecimal bytes with colons between them"),
        )
    })?;
    if !is_station(mac) {
        return Err(Error::config(
            "mac",
            format!("{text} is a multicast address: give one whose first byte is even"),
        ));
    }
    Ok(mac)
}

/// Checks the name of a tap: 1 to 15 bytes without '/', ':' or white space (`dev_valid_name` of Linux).
fn check_tap(tap: String, mac: [u8; 6]) -> Result<NetConfig, Error> {
    let bad =
        tap.is_empty() || tap.len() > 15 || tap.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if bad {
        return Err(Error::config(
            "tap",
            format!("{tap:?} is not an interface name: give 1 to 15 bytes without '/', ':' or space"),
        ));
    }
    Ok(NetConfig { tap, mac })
}

impl FromStr for DiskConfig {
    type Err = Error;

    /// `FILE` or `FILE,ro`.
    fn from_str(text: &str) -> Result<DiskConfig, Error> {
        let (path, read_only) = match text.rsplit_once(',') {
            Some((path, "ro")) => (path, true),
            _ => (text, false),
        };
        if path.is_empty() {
            return Err(Error::config("disk", "the file name is empty: give FILE or FILE,ro"));
        }
        Ok(DiskConfig { path: path.into(), read_only })
    }
}

impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.path.display(), if self.read_only { ",ro" } else { "" })
    }
}

/// Converts `ADDRESS/PREFIX[,GATEWAY]` to the kernel's `ip=` parameter.
fn ip_argument(text: &str) -> Result<String, Error> {
    let bad = || Error::config("ip", format!("{text:?} is not ADDRESS/PREFIX or ADDRESS/PREFIX,GATEWAY"));
    let (network, gateway) = match text.split_once(',') {
        Some((n, g)) => (n, Some(Ipv4Addr::from_str(g).map_err(|_| bad())?)),
        None => (text, None),
    };
    let (address, prefix) = network.split_once('/').ok_or_else(bad)?;
    let address = Ipv4Addr::from_str(address).map_err(|_| bad())?;
    let prefix: u32 = prefix.parse().ok().filter(|p| *p <= 32).ok_or_else(bad)?;
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - prefix).unwrap_or(0));
    let gateway = gateway.map(|g| g.to_string()).unwrap_or_default();
    Ok(format!("ip={address}::{gateway}:{mask}::eth0:off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(r: Result<impl std::fmt::Debug, Error>) -> String {
        match r.expect_err("accepted") {
            Error::Config { field, .. } => field,
            e => panic!("{e}"),
        }
    }

    #[test]
    fn addresses_become_the_kernels_parameter() {
        assert_eq!(
            ip_argument("10.0.0.2/24,10.0.0.1").unwrap(),
            "ip=10.0.0.2::10.0.0.1:255.255.255.0::eth0:off"
        );
        assert_eq!(ip_argument("10.0.0.2/0").unwrap(), "ip=10.0.0.2:::0.0.0.0::eth0:off");
        for bad in ["10.0.0.2", "10.0.0.2/33", "10.0.0/8", "10.0.0.2/8,x", ""] {
            assert_eq!(field(ip_argument(bad)), "ip");
        }
    }

    #[test]
    fn mac_addresses_are_six_bytes_of_one_station() {
        assert_eq!(parse_mac("02:00:5e:10:00:ff").unwrap(), [2, 0, 0x5e, 0x10, 0, 0xff]);
        for bad in ["02:00:5e:10:00", "02:00:5e:10:00:00:00", "01:00:5e:10:00:ff", "zz:0:0:0:0:0"] {
            assert_eq!(field(parse_mac(bad)), "mac");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_fields_are_named() {
        let file: RunOptions = toml::from_str("kernel = 'a'\nmemory_mib = 64\ndisks = ['d,ro']").unwrap();
        let flags = RunOptions { memory_mib: Some(128), ..RunOptions::default() };
        let plan = flags.over(file).check().unwrap();
        assert_eq!(plan.memory, 128 << 20);
        assert_eq!(plan.kernel, PathBuf::from("a"));
        assert_eq!(plan.disks, [DiskConfig { path: "d".into(), read_only: true }]);
        let error = toml::from_str::<RunOptions>("memroy_mib = 64").unwrap_err();
        assert!(error.to_string().contains("memroy_mib"), "{error}");
    }

    #[test]
    fn a_missing_kernel_and_silly_sizes_are_named() {
        assert_eq!(field(RunOptions::default().check()), "kernel");
        let o = RunOptions { kernel: Some("k".into()), memory_mib: Some(1), ..RunOptions::default() };
        assert_eq!(field(o.check()), "memory-mib");
        let o = RunOptions { kernel: Some("k".into()), tap: Some("a/b".into()), ..RunOptions::default() };
        assert_eq!(field(o.check()), "tap");
    }
}
