//! `vmft run`: a machine alone, neither recorded nor protected.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use entry::{End, Position};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use vmm::guest_loop::Turn;
use vmm::inbox::{Inbox, InboxSender};
use vmm::source::{Live, Stops};
use vmm::{BootFile, BootFiles, BootPlan, Engine as VmmEngine, GuestLoop, Machine, MachineConfig, Slot};

use crate::error::Error;
use crate::options::{ClockMode, Engine, Plan, RunOptions};
use crate::outside::console::{Printer, read_keys};
use crate::outside::disk::Image;
use crate::outside::tap::Tap;
use crate::outside::terminal::RawMode;
use crate::outside::{Host, Traffic};
use crate::summary::Summary;

/// What `vmft run` takes beside the machine itself.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    machine: RunOptions,
    /// End with success once the console has printed this
    #[arg(long, value_name = "TEXT")]
    until: Option<String>,
    /// Stop exactly after this many retired instructions; implies --clock virtual
    #[arg(long, value_name = "COUNT")]
    stop_at: Option<u64>,
    /// Print the digest of the whole machine exactly there; implies --clock virtual
    #[arg(long, value_name = "COUNT,...", value_delimiter = ',')]
    digest_at: Vec<u64>,
    /// Write the summary to this file as JSON
    #[arg(long, value_name = "FILE")]
    summary_json: Option<PathBuf>,
}

/// Frames, keys and disk completions that may wait for the guest, of each device.
const INBOX_CAPACITY: usize = 1024;

/// Runs the guest to its end.
pub fn run(args: RunArgs) -> Result<(), Error> {
    let plan = args.machine.clone().check()?;
    let exact = args.stop_at.is_some() || !args.digest_at.is_empty();
    let clock = match plan.clock {
        None if exact => ClockMode::Virtual,
        Some(ClockMode::Host) if exact => {
            return Err(Error::config("clock", "--stop-at and --digest-at need --clock virtual"));
        }
        given => given.unwrap_or_default(),
    };
    let (machine, images) = build(&plan, clock)?;
    let (inbox, sender) = Inbox::new(machine.kicker(), INBOX_CAPACITY);
    let mut host = Host::new(inbox, Printer::new(args.until.clone()), clock, machine.time_ns())?;
    attach(&mut host, &plan, images, &sender)?;
    let signals = stop_on_signals(&sender)?;
    let terminal = RawMode::enter().map_err(Error::host("terminal"))?;
    std::thread::spawn(move || read_keys(sender));

    let started = Instant::now();
    let from = machine.position().count;
    // What a restored machine has behind it cannot be had again.
    let digests: BTreeSet<u64> = args.digest_at.iter().copied().filter(|count| *count >= from).collect();
    let digests = digests.into_iter().map(Position::exact).collect();
    let stops = Stops { digests, pause: None };
    let mut guest = GuestLoop { source: Live::new(host, VmmEngine::Soft.unit(), stops), machine };
    let ended = drive(&mut guest, &args);
    drop(terminal);
    signals.close();
    let traffic = guest.source.outside().traffic();
    finish(&guest.machine, from, started, traffic, ended, &args)
}

/// Prints the summary and turns the run's end into the command's.
fn finish(
    machine: &Machine,
    from: u64,
    started: Instant,
    traffic: Traffic,
    ended: Result<Option<End>, Error>,
    args: &RunArgs,
) -> Result<(), Error> {
    let summary = Summary::new(machine, from, started.elapsed(), traffic);
    eprint!("{summary}");
    if let Some(path) = &args.summary_json {
        let file = File::create(path).map_err(Error::host(path.display().to_string()))?;
        serde_json::to_writer_pretty(file, &summary)
            .map_err(std::io::Error::from)
            .map_err(Error::host(path.display().to_string()))?;
    }
    match ended? {
        Some(End::TripleFault) => Err(Error::GuestCrash { instructions: machine.position().count }),
        _ => Ok(()),
    }
}

/// The machine of a plan, new or restored, and the images of its disks.
fn build(plan: &Plan, clock: ClockMode) -> Result<(Machine, Vec<Image>), Error> {
    let images = plan.disks.iter().map(Image::open).collect::<Result<Vec<_>, _>>()?;
    let config = MachineConfig {
        engine: engine(plan.engine),
        memory_bytes: plan.memory,
        epoch_s: epoch_s(clock),
        slots: slots(plan, &images),
    };
    let files = BootFiles {
        kernel: read_file("kernel", &plan.kernel)?,
        initrd: plan.initrd.as_deref().map(|f| read_file("initrd", f)).transpose()?,
        command_line: plan.cmdline.clone(),
        seed: Some(seed(clock)?),
    };
    let boot = BootPlan::new(&files, &config)?;
    let machine = Machine::new(config, boot)?;
    Ok((machine, images))
}

/// Says which engine runs the guest, and why.
fn engine(asked: Engine) -> VmmEngine {
    match asked {
        Engine::Auto => eprintln!("engine: soft (the only one that lands exactly on every host)"),
        Engine::Soft => eprintln!("engine: soft"),
    }
    VmmEngine::Soft
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
        random.map_err(Error::host("/dev/urandom"))?;
    }
    Ok(seed)
}

/// Network first, then disks, then entropy: the numbers of the slots follow from the options alone.
fn slots(plan: &Plan, images: &[Image]) -> Vec<Slot> {
    let net = plan.net.iter().map(|n| Slot::Net { mac: n.mac });
    let disks = plan.disks.iter().zip(images);
    let disks = disks.map(|(d, image)| Slot::Disk { bytes: image.bytes(), read_only: d.read_only });
    net.chain(disks).chain([Slot::Entropy]).collect()
}

fn attach(host: &mut Host, plan: &Plan, images: Vec<Image>, sender: &InboxSender) -> Result<(), Error> {
    let mut slot = 0;
    if let Some(net) = &plan.net {
        let tap = Tap::open(&net.tap).map_err(Error::host(format!("tap {}", net.tap)))?;
        host.attach_tap(slot, tap, sender.clone());
        slot += 1;
    }
    for (slot, image) in (slot..).zip(images) {
        host.attach_disk(slot, image, sender.clone());
    }
    Ok(())
}

fn read_file(field: &str, path: &Path) -> Result<BootFile, Error> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| Error::config(field, format!("{name}: {e}")))?;
    Ok(BootFile { name, bytes: bytes.into() })
}

/// SIGINT and SIGTERM end the run in an orderly way.
fn stop_on_signals(sender: &InboxSender) -> Result<Handle, Error> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Error::host("signal handlers"))?;
    let handle = signals.handle();
    let sender = sender.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            sender.stop();
        }
    });
    Ok(handle)
}

/// Positions at which the guest pauses: to be saved, and to stop.
fn pauses(args: &RunArgs) -> BTreeSet<u64> {
    args.stop_at.into_iter().collect()
}

/// Runs the guest until it pauses or ends, and says how far it is as long as it says nothing itself.
fn run_to_pause(guest: &mut GuestLoop<Live<Host>>) -> Result<Turn, Error> {
    loop {
        match guest.turn()? {
            Turn::Again => guest.source.outside().show_progress(guest.machine.position().count),
            turn => return Ok(turn),
        }
    }
}

/// Runs the guest until its end, `None` when it was stopped before.
fn drive(guest: &mut GuestLoop<Live<Host>>, args: &RunArgs) -> Result<Option<End>, Error> {
    let mut pauses = pauses(args).into_iter();
    loop {
        let pause = pauses.next();
        guest.source.pause_at(pause.map(Position::exact));
        if let Turn::Finished(end) = run_to_pause(guest)? {
            return Ok(Some(end));
        }
        let at = guest.machine.position().count;
        if pause != Some(at) {
            return Ok(None);
        }
        if args.stop_at == pause {
            return Ok(None);
        }
    }
}
