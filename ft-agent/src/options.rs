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
use twox_hash::XxHash3_128;
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
    /// MAC address of the guest; needs --tap [default: made of the VM's name, or of this host's id and the tap's name]
    #[arg(long, value_name = "MAC")]
    pub mac: Option<String>,
    /// IPv4 address of the guest; needs --tap; becomes ip= on the kernel command line
    #[arg(long, value_name = "ADDRESS/PREFIX[,GATEWAY]")]
    pub ip: Option<String>,
    /// Raw disk image, read-only with ,ro; may be given several times. An image that looks like qcow2 or the like is refused,
    /// unless ,raw says that it is raw anyway
    #[arg(long = "disk", value_name = "FILE[,ro][,raw]")]
    pub disks: Vec<String>,
}

/// A disk of the guest: the image file and how it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image file.
    pub path: PathBuf,
    /// The guest may not write to it.
    pub read_only: bool,
    /// It is raw even if it looks like another format.
    pub raw: bool,
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

impl RunOptions {
    /// Checks the options, together with those of the file that `config` names. `vm` is what no other VM is called, if it has
    /// such a name.
    ///
    /// # Errors
    /// [`Error::Config`] names the field.
    pub fn check(self, vm: Option<&str>) -> Result<GuestPlan, Error> {
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
        for (field, is_given) in [("mac", mac.is_some()), ("ip", o.ip.is_some())] {
            if is_given && o.tap.is_none() {
                let why = format!("the guest has no network: give --tap NAME, or leave --{field} out");
                return Err(Error::config(field, why));
            }
        }
        if o.starvation_ms.is_some() && matches!(o.cpu, Some(CpuChoice::Soft | CpuChoice::Interpreter)) {
            let why = "it is for guests on KVM: give --cpu kvm or auto, or leave --starvation-ms out";
            return Err(Error::config("starvation-ms", why));
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
            net: o.tap.map(|tap| check_tap(tap, mac, vm)).transpose()?,
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
fn check_tap(tap: String, mac: Option<[u8; 6]>, vm: Option<&str>) -> Result<NetConfig, Error> {
    let bad =
        tap.is_empty() || tap.len() > 15 || tap.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if bad {
        return Err(Error::config(
            "tap",
            format!("{tap:?} is not an interface name: give 1 to 15 bytes without '/', ':' or space"),
        ));
    }
    let mac = mac.unwrap_or_else(|| match vm {
        Some(vm) => default_mac(&format!("vm {vm}")),
        None => default_mac(&format!("host {} tap {tap}", host_id())),
    });
    Ok(NetConfig { tap, mac })
}

/// A MAC address for whatever has this name: locally administered, and 40 bits of a hash.
fn default_mac(name: &str) -> [u8; 6] {
    let [a, b, c, d, e, ..] = XxHash3_128::oneshot(name.as_bytes()).to_le_bytes();
    [0x02, a, b, c, d, e]
}

/// What tells this host from others, and stays the same: its machine id, or else its name.
fn host_id() -> String {
    let files = ["/etc/machine-id", "/proc/sys/kernel/hostname"];
    let id =
        files.iter().filter_map(|file| std::fs::read_to_string(file).ok()).map(|id| id.trim().to_owned());
    id.into_iter().find(|id| !id.is_empty()).unwrap_or_default()
}

impl FromStr for DiskConfig {
    type Err = Error;

    /// `FILE`, and then perhaps `,ro` or `,raw` or both.
    fn from_str(text: &str) -> Result<DiskConfig, Error> {
        let (mut path, mut read_only, mut raw) = (text, false, false);
        loop {
            match path.rsplit_once(',') {
                Some((file, "ro")) => (path, read_only) = (file, true),
                Some((file, "raw")) => (path, raw) = (file, true),
                _ => break,
            }
        }
        if path.is_empty() {
            return Err(Error::config("disk", "the file name is empty: give FILE, FILE,ro or FILE,raw"));
        }
        Ok(DiskConfig { path: path.into(), read_only, raw })
    }
}

impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |is: bool, word| if is { word } else { "" };
        write!(f, "{}{}{}", self.path.display(), of(self.read_only, ",ro"), of(self.raw, ",raw"))
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
        let plan = flags.over(file).check(None).unwrap();
        assert_eq!(plan.memory, 128 << 20);
        assert_eq!(plan.kernel, PathBuf::from("a"));
        assert_eq!(plan.disks, [DiskConfig { path: "d".into(), read_only: true, raw: false }]);
        let error = toml::from_str::<RunOptions>("memroy_mib = 64").unwrap_err();
        assert!(error.to_string().contains("memroy_mib"), "{error}");
    }

    #[test]
    fn no_two_vms_have_the_same_default_mac() {
        let mac = |tap: &str, vm| check_tap(tap.into(), None, vm).unwrap().mac;
        let all = [mac("tap0", None), mac("tap1", None), mac("tap0", Some("a")), mac("tap0", Some("b"))];
        for (n, one) in all.iter().enumerate() {
            assert!(is_station(*one) && one[0] == 2);
            assert!(!all[..n].contains(one), "{all:?}");
        }
        // Both sides of a pair come to the same, whatever their taps are called.
        assert_eq!(mac("tap0", Some("a")), mac("tap7", Some("a")));
    }

    #[test]
    fn options_that_do_nothing_are_refused() {
        let bare = || RunOptions { kernel: Some("k".into()), ..RunOptions::default() };
        let ip = RunOptions { ip: Some("10.0.0.2/24".into()), ..bare() };
        assert_eq!(field(ip.check(None)), "ip");
        let starved = RunOptions { starvation_ms: Some(5), cpu: Some(CpuChoice::Soft), ..bare() };
        assert_eq!(field(starved.check(None)), "starvation-ms");
    }

    #[test]
    fn words_after_a_disk_say_how_it_is_used() {
        let disk = |text: &str| text.parse::<DiskConfig>().unwrap();
        for text in ["a", "a,ro", "a,raw", "a,ro,raw", "a,b"] {
            assert_eq!(disk(text).to_string(), text);
        }
        assert_eq!(disk("a,raw,ro"), disk("a,ro,raw"));
        assert_eq!(disk("a,b").path, PathBuf::from("a,b"));
    }

    #[test]
    fn a_missing_kernel_and_silly_sizes_are_named() {
        assert_eq!(field(RunOptions::default().check(None)), "kernel");
        let o = RunOptions { kernel: Some("k".into()), memory_mib: Some(1), ..RunOptions::default() };
        assert_eq!(field(o.check(None)), "memory-mib");
        let o = RunOptions { kernel: Some("k".into()), tap: Some("a/b".into()), ..RunOptions::default() };
        assert_eq!(field(o.check(None)), "tap");
    }
}
