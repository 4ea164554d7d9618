//! A guest before its start: configuration, boot files and disks, from the user's options or from a log's identity.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use entry::identity::{HINT, Identity};
use tracing::{info, warn};
use twox_hash::XxHash3_128;
use vmm::machine::MACHINE_VERSION;
use vmm::{BootFile, BootFiles, BootPlan, Engine, Machine, MachineConfig, Slot};

use crate::error::Error;
use crate::options::{ClockMode, DiskConfig, GuestPlan};
use crate::outside::disk::Image;

/// Everything that a machine starts from, except the content of its disks.
pub struct Guest {
    /// Configuration of the machine.
    pub config: MachineConfig,
    /// The files that it boots from.
    pub files: BootFiles,
    /// The file that the kernel was read from.
    kernel: PathBuf,
    /// The file that the initial RAM disk was read from.
    initrd: Option<PathBuf>,
    /// The disks, in the order of their slots.
    pub disks: Vec<DiskConfig>,
    /// Digests of the content of the disks at the start, once they have been read.
    disk_contents: OnceLock<Vec<String>>,
}

impl Guest {
    /// The guest that checked options describe, with the open images of its disks. `clock` says whether the host's date and
    /// random numbers may enter it.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn new(plan: &GuestPlan, clock: ClockMode) -> Result<(Guest, Vec<Image>), Error> {
        let images = plan.disks.iter().map(Image::open).collect::<Result<Vec<_>, _>>()?;
        let config = MachineConfig {
            engine: plan.engine,
            memory_bytes: plan.memory,
            epoch_s: epoch_s(clock),
            slots: slots(plan, &images),
        };
        let guest = Guest {
            config,
            files: boot_files(
                &plan.kernel,
                plan.initrd.as_deref(),
                plan.cmdline.clone(),
                seed(clock)?,
                plan.engine,
            )?,
            kernel: plan.kernel.clone(),
            initrd: plan.initrd.clone(),
            disks: plan.disks.clone(),
            disk_contents: OnceLock::new(),
        };
        Ok((guest, images))
    }

    /// The files that it is made of.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let disks = self.disks.iter().map(|disk| disk.path.as_path());
        [self.kernel.as_path()].into_iter().chain(self.initrd.as_deref()).chain(disks)
    }

    /// The machine at the start of its boot.
    ///
    /// # Errors
    /// The files cannot be booted on it, or the host has no memory for it.
    pub fn boot(&self) -> Result<Machine, Error> {
        let plan = BootPlan::new(&self.files, &self.config)?;
        if self.files.rewrite {
            match plan.rewritten() {
                Some(rewritten) if rewritten.is_empty() => {}
                Some(rewritten) => info!("kernel: {rewritten}"),
                None => warn!(
                    "kernel: warning: {} is not an ELF file with sections, so RDTSC, RDRAND and similar \
                     instructions stay in it and a replay may diverge: boot an ELF vmlinux",
                    self.files.kernel.name()
                ),
            }
        }
        let machine = Machine::new(self.config.clone(), plan)?;
        if let Some(warning) = machine.engine_warning() {
            warn!("engine: warning: {warning}");
        }
        Ok(machine)
    }

    /// The identity that a log of this guest begins with. The first call reads the whole disks.
    ///
    /// # Errors
    /// A disk cannot be read.
    pub fn identity(&self) -> Result<Identity, Error> {
        let slots =
            serde_json::to_string(&self.config.slots).unwrap_or_else(|e| unreachable!("plain data: {e}"));
        let path = |p: &Path| p.display().to_string();
        let mut identity = Identity::new(self.config.engine.unit())
            .field("machine-version", MACHINE_VERSION)
            .field("engine", self.config.engine.name())
            .field("memory-bytes", self.config.memory_bytes)
            .field("epoch-s", self.config.epoch_s)
            .field("slots", slots)
            .field("kernel", content(&self.files.kernel))
            .field("cmdline", &self.files.command_line)
            .field("seed", hex(self.files.seed.as_ref().map_or(&[][..], |s| &s[..])))
            .field(&format!("{HINT}kernel"), path(&self.kernel));
        if let (Some(file), Some(from)) = (&self.files.initrd, &self.initrd) {
            identity = identity.field("initrd", content(file)).field(&format!("{HINT}initrd"), path(from));
        }
        let contents = match self.disk_contents.get() {
            Some(contents) => contents,
            None => {
                let read = self.disks.iter().map(|d| disk_content(&d.path)).collect::<Result<_, _>>()?;
                self.disk_contents.get_or_init(|| read)
            }
        };
        for (n, (disk, content)) in self.disks.iter().zip(contents).enumerate() {
            identity = identity
                .field(&format!("disk-{n}"), content)
                .field(&format!("{HINT}disk-{n}"), disk.to_string());
        }
        Ok(identity)
    }

    /// Takes over what the primary chose when its guest started: the date and the seed of its random numbers. If one of them
    /// is missing, the comparison of the identities fails later.
    pub fn adopt(&mut self, primary: &Identity) {
        if let Some(epoch_s) = primary.get("epoch-s").and_then(|t| t.parse().ok()) {
            self.config.epoch_s = epoch_s;
        }
        if let Some(seed) = primary.get("seed").and_then(unhex) {
            self.files.seed = Some(seed);
        }
    }

    /// The guest of a recording. Its files are those that `elsewhere` gives, or are where the log says they were.
    ///
    /// # Errors
    /// A file is missing, or is not the one of the recording; the error names the field.
    pub fn from_recording(identity: &Identity, elsewhere: &FileOverrides) -> Result<Guest, Error> {
        let hint = |name: &str| identity.get(&format!("{HINT}{name}")).map(str::to_owned);
        let kernel = elsewhere.kernel.clone().or(hint("kernel").map(PathBuf::from));
        let kernel = kernel.ok_or_else(|| {
            Error::config("kernel", "the log does not say where its kernel was: give --kernel FILE")
        })?;
        let initrd = elsewhere.initrd.clone().or(hint("initrd").map(PathBuf::from));
        let hinted = (0..).map_while(|n| hint(&format!("disk-{n}"))).collect::<Vec<_>>();
        let disks = if elsewhere.disks.is_empty() { &hinted } else { &elsewhere.disks };
        let disks = disks.iter().map(|d| d.parse()).collect::<Result<Vec<DiskConfig>, _>>()?;
        let files =
            [("kernel", kernel.as_path())].into_iter().chain(initrd.as_deref().map(|f| ("initrd", f)));
        for (field, path) in files.chain(disks.iter().map(|disk| ("disk", disk.path.as_path()))) {
            check_regular(field, path)?;
        }
        let text = |name: &str| {
            identity.get(name).ok_or_else(|| Error::config(name, "the log's identity lacks this field"))
        };
        let cmdline = text("cmdline")?.to_owned();
        let seed = parse("seed", text("seed")?, unhex)?;
        let engine = parse("engine", text("engine")?, Engine::named)?;
        let files = boot_files(&kernel, initrd.as_deref(), cmdline, seed, engine)?;
        let guest = Guest {
            config: MachineConfig {
                engine,
                memory_bytes: parse("memory-bytes", text("memory-bytes")?, |t| t.parse().ok())?,
                epoch_s: parse("epoch-s", text("epoch-s")?, |t| t.parse().ok())?,
                slots: parse("slots", text("slots")?, |t| serde_json::from_str(t).ok())?,
            },
            files,
            kernel,
            initrd,
            disks,
            disk_contents: OnceLock::new(),
        };
        match guest.identity()?.check(identity) {
            Ok(()) => Ok(guest),
            Err(difference) => {
                let why = format!("this machine is not the recorded one: they differ in {difference}");
                Err(Error::config(&difference.field, why))
            }
        }
    }
}

/// Files of a recording that are not where they were when it was made.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct FileOverrides {
    /// The recording's kernel, if its file was moved
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The recording's initial RAM disk, if its file was moved
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The recording's disk as it was at the start, if its file was moved; give all disks, in the same order
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    pub disks: Vec<String>,
}

/// Refuses what is no file: a log comes from others, and opening a device or a FIFO that it names may do something, or
/// wait for ever.
fn check_regular(field: &str, path: &Path) -> Result<(), Error> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            let why = format!(
                "{} is no regular file, and is not opened; give the file of the recording",
                path.display()
            );
            Err(Error::config(field, why))
        }
        // What cannot be found is told where it is opened.
        _ => Ok(()),
    }
}

fn parse<T>(field: &str, text: &str, f: impl FnOnce(&str) -> Option<T>) -> Result<T, Error> {
    f(text).ok_or_else(|| {
        Error::config(field, format!("this version of vmft cannot use the log's value {text:?}"))
    })
}

/// Seconds since 1970 at guest time 0.
fn epoch_s(clock: ClockMode) -> i64 {
    /// 2000-01-01.
    const FIXED: i64 = 946_684_800;
    match clock {
        ClockMode::Virtual => FIXED,
        ClockMode::Host => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(FIXED, |d| d.as_secs() as i64)
        }
    }
}

/// Seed of the guest's random numbers.
fn seed(clock: ClockMode) -> Result<[u8; 32], Error> {
    let mut seed = [0x5a; 32];
    if clock == ClockMode::Host {
        let random = File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut seed));
        random.map_err(Error::host("cannot read /dev/urandom"))?;
    }
    Ok(seed)
}

/// The slots: network first, then disks, then entropy, so that their numbers follow from the options alone.
fn slots(plan: &GuestPlan, images: &[Image]) -> Vec<Slot> {
    let net = plan.net.iter().map(|n| Slot::Net { mac: n.mac });
    let disks = plan.disks.iter().zip(images);
    let disks = disks.map(|(d, image)| Slot::Disk { bytes: image.bytes(), read_only: d.read_only });
    net.chain(disks).chain([Slot::Entropy]).collect()
}

fn boot_files(
    kernel: &Path,
    initrd: Option<&Path>,
    command_line: String,
    seed: [u8; 32],
    engine: Engine,
) -> Result<BootFiles, Error> {
    Ok(BootFiles {
        kernel: read_file("kernel", kernel)?,
        initrd: initrd.map(|f| read_file("initrd", f)).transpose()?,
        command_line,
        seed: Some(seed),
        rewrite: engine.is_kvm(),
    })
}

fn read_file(field: &str, path: &Path) -> Result<BootFile, Error> {
    let name = path.display().to_string();
    let bytes =
        std::fs::read(path).map_err(|e| Error::config(field, format!("cannot read {field} {name}: {e}")))?;
    Ok(BootFile::new(name, bytes))
}

/// Digest of a file's content, in the form that identities use.
fn content(file: &BootFile) -> String {
    format!("{:032x}", file.digest().0)
}

/// Digest of a disk image's content, in the same form.
fn disk_content(path: &Path) -> Result<String, Error> {
    let read = || -> io::Result<u128> {
        let mut file = File::open(path)?;
        let mut hash = XxHash3_128::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hash.finish_128()),
                n => hash.write(&buffer[..n]),
            }
        }
    };
    let digest = read().map_err(Error::host(format!("cannot read disk image {}", path.display())))?;
    Ok(format!("{digest:032x}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes().chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 16).ok());
    digits.collect::<Option<Vec<_>>>()?.try_into().ok()
}
