//! `vmft replay`: runs a machine whose inputs come from a log.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use entry::log::{EndReason, Entry};
use entry::{DiskRequest, DiskResult, End, Output, Position, PositionUnit};
use vmm::GuestLoop;
use vmm::bisect::{Bisection, PiecewiseReplay, bisect};
use vmm::guest_loop::{LoopError, Turn};
use vmm::replay::{Records, ReplayError, Replayer, Standby};
use vmm::vcpu::landing::Landings;

use crate::confine::{self, Needs, directory_of};
use crate::error::Error;
use crate::guest::{FileOverrides, Guest};
use crate::log_command::warn_if_cut_off;
use crate::log_file::LogReader;
use crate::outside::disk::Image;
use crate::report::print;

/// Arguments of `vmft replay`.
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// The log
    file: PathBuf,
    #[command(flatten)]
    elsewhere: FileOverrides,
    /// Stop at this position
    #[arg(long, value_name = "POSITION")]
    to: Option<u64>,
    /// Print a digest of the whole machine at exactly these positions, as lines "digest POSITION DIGEST" on standard output
    #[arg(long, value_name = "POSITION,...", value_delimiter = ',')]
    digest_at: Vec<u64>,
    /// Repeat the replay until one diverges, at most this many times
    #[arg(long, value_name = "TIMES", value_parser = clap::value_parser!(u32).range(1..))]
    until_divergence: Option<u32>,
    /// Replay twice side by side, one replay with extra stops, and bisect to the first position where the two differ
    #[arg(long, conflicts_with_all = ["to", "digest_at", "until_divergence"])]
    bisect: bool,
    /// For debugging: do not confine the process with seccomp and Landlock
    #[arg(long)]
    no_confine: bool,
}

/// Private copies of a recording's disks; they are removed when this is dropped.
struct DiskCopies {
    /// The copies, with their slots.
    images: Vec<(u8, Image)>,
    /// Results of requests whose completion has not come in the log yet: slot, id, result.
    results: Vec<(u8, u64, DiskResult)>,
}

impl DiskCopies {
    fn new(guest: &Guest) -> Result<DiskCopies, Error> {
        let slots = guest.config.slots.iter().enumerate();
        let slots = slots.filter(|(_, s)| matches!(s, vmm::Slot::Disk { .. })).map(|(n, _)| n as u8);
        let copy = |(slot, disk): (u8, &crate::options::DiskConfig)| Ok((slot, Image::private_copy(disk)?));
        let images = slots.zip(&guest.disks).map(copy).collect::<Result<_, Error>>()?;
        Ok(DiskCopies { images, results: Vec::new() })
    }
}

impl Standby for DiskCopies {
    type Error = Error;

    fn start(&mut self, request: DiskRequest) -> Result<(), Error> {
        let image = self.images.iter().find(|(slot, _)| *slot == request.slot);
        if let Some((_, image)) = image {
            self.results.push((request.slot, request.id, image.perform(&request)?));
        }
        Ok(())
    }

    fn finish(&mut self, slot: u8, id: u64) -> Result<Option<DiskResult>, Error> {
        let at = self.results.iter().position(|(s, i, _)| (*s, *i) == (slot, id));
        Ok(at.map(|at| self.results.swap_remove(at).2))
    }

    fn output(&mut self, _output: Output) -> Result<(), Error> {
        Ok(())
    }
}

/// Replays a log, once or until a replay diverges.
///
/// # Errors
/// The replay diverges, the log is damaged, or a file is not that of the recording.
pub fn run(args: &ReplayArgs) -> Result<(), Error> {
    if !args.no_confine && args.repeats() {
        confine_repeated(args)?;
    }
    if args.bisect {
        return bisect_replays(args);
    }
    let times = args.until_divergence.unwrap_or(1);
    for n in 1..=times {
        replay(args)?;
        if times > 1 {
            host_log::say!("replay {n} of {times}: no divergence");
        }
    }
    Ok(())
}

impl ReplayArgs {
    /// Whether files are opened again after the first replay has begun.
    fn repeats(&self) -> bool {
        self.bisect || self.until_divergence.is_some()
    }
}

/// Confines a process that replays several times to the files of the recording, which are read each time.
fn confine_repeated(args: &ReplayArgs) -> Result<(), Error> {
    let (_, identity) = LogReader::open(&args.file)?;
    let guest = Guest::from_recording(&identity, &args.elsewhere)?;
    let engine = guest.config.engine;
    // An error is told when a machine is made.
    engine.reserve(2).ok();
    confine::lone_process(&Needs {
        read: guest.paths().chain([args.file.as_path()]).map(Path::to_owned).collect(),
        devices: engine.is_kvm().then(|| "/dev/kvm".into()).into_iter().collect(),
        // Private copies of disks are beside them.
        make_in: guest.disks.iter().map(|disk| directory_of(&disk.path)).collect(),
        kvm: engine.is_kvm(),
        ..Needs::default()
    });
    Ok(())
}

/// Sets up a replay at the start of the log.
fn start(args: &ReplayArgs) -> Result<LogReplay, Error> {
    let (reader, identity) = LogReader::open(&args.file)?;
    let guest = Guest::from_recording(&identity, &args.elsewhere)?;
    let machine = guest.boot()?;
    Ok(GuestLoop { machine, source: Replayer::new(reader, DiskCopies::new(&guest)?) })
}

/// How many instructions the second of two replays runs between stops: as few as between the kicks of a recording, and not
/// commensurable with any interval of the machine.
const PIECE: u64 = 49_999;

fn bisect_replays(args: &ReplayArgs) -> Result<(), Error> {
    let (mut reader, _) = LogReader::open(&args.file)?;
    let mut stops = Vec::new();
    let mut end = 0;
    while let Some(record) = reader.next()? {
        end = record.position.count + 1;
        if matches!(record.entry, Entry::State(_)) {
            stops.push(record.position.count);
        }
    }
    stops.push(end);
    let mut pairs = 0;
    let pair = || {
        pairs += 1;
        host_log::say!("comparing two replays, pass {pairs}");
        Ok([u64::MAX, PIECE].map(|piece| Ok(PiecewiseReplay { guest: start(args)?, piece })))
            .and_then(|[one, other]: [Result<_, Error>; 2]| Ok([one?, other?]))
            .map_err(|e| LoopError::Source(ReplayError::Log(e)))
    };
    match bisect(pair, &stops) {
        Ok(Bisection::Equal(None)) => {
            host_log::say!("no difference between two replays, nor between them and the log");
            Ok(())
        }
        Ok(Bisection::Equal(Some(divergence))) => {
            host_log::say!("both replays are equal, and both differ from the log");
            Err(Error::Divergence(divergence))
        }
        Ok(Bisection::Different(parting)) => Err(Error::ReplaysDiffer(parting)),
        Ok(Bisection::Intermittent { equal_at, differs_at }) => {
            Err(Error::NotRepeatable { equal_at, differs_at })
        }
        Err(LoopError::Machine(e)) => Err(e.into()),
        Err(LoopError::Source(e)) => Err(error(e)),
    }
}

fn replay(args: &ReplayArgs) -> Result<(), Error> {
    let mut guest = start(args)?;
    let started = Instant::now();
    let mut stops: Vec<u64> = args.digest_at.iter().copied().chain(args.to).collect();
    stops.sort_unstable();
    stops.dedup();
    let mut progress = Progress::new(&args.file)?;
    if !args.no_confine && !args.repeats() {
        let kvm = guest.machine.unit() != PositionUnit::Instructions;
        confine::lone_process(&Needs { kvm, ..Needs::default() });
    }
    for stop in stops.into_iter().map(Some).chain([None]) {
        let stop = stop.filter(|s| args.to.is_none_or(|to| *s <= to));
        if stop.is_none() && args.to.is_some() {
            break;
        }
        guest.source.pause_at(stop.map(Position::exact));
        run_to_pause(&mut guest, &mut progress)?;
        let at = guest.machine.position().count;
        if stop == Some(at) && args.digest_at.contains(&at) {
            let digest = guest.machine.digest()?;
            progress.clear();
            if !print(&format!("digest {at} {}\n", digest.total()))? {
                return Ok(());
            }
        }
        if guest.source.is_done() {
            break;
        }
    }
    progress.clear();
    report(&guest, started.elapsed(), args)
}

type LogReplay = GuestLoop<Replayer<LogReader, DiskCopies>>;

fn run_to_pause(guest: &mut LogReplay, progress: &mut Progress) -> Result<(), Error> {
    loop {
        match guest.run_once() {
            Ok(Turn::Again) => {
                let time_ns = guest.machine.time_ns();
                progress.show(guest.source.records().offset(), time_ns);
            }
            Ok(Turn::Paused | Turn::Finished(_)) => return Ok(()),
            Err(LoopError::Machine(e)) => return Err(e.into()),
            Err(LoopError::Source(e)) => return Err(error(e)),
        }
    }
}

fn error(e: ReplayError<Error, Error>) -> Error {
    match e {
        ReplayError::Log(e) | ReplayError::Standby(e) => e,
        ReplayError::Divergence(d) => Error::Divergence(d),
    }
}

fn report(guest: &LogReplay, wall: Duration, args: &ReplayArgs) -> Result<(), Error> {
    let at = guest.machine.position().count;
    let source = &guest.source;
    let guest_s = guest.machine.time_ns() as f64 / 1e9;
    // If guest time follows the host's clock, the guest was busy whenever it was not idle.
    let busy_s = guest_s - guest.machine.counts().idle_ns as f64 / 1e9;
    let wall_s = wall.as_secs_f64().max(1e-9);
    host_log::say!(
        "replayed {} entries to position {at} in {wall_s:.3} s: {:.1} MIPS; {guest_s:.3} guest seconds, {busy_s:.3} of \
         them busy; the replay ran {:.2} times as fast as the busy time",
        source.applied(),
        at as f64 / 1e6 / wall_s,
        busy_s / wall_s,
    );
    match source.ended() {
        Some(EndReason::Stopped) => host_log::say!("the recording was stopped here"),
        Some(EndReason::Guest(End::PowerOff)) => host_log::say!("the guest powered off"),
        Some(EndReason::Guest(End::Reboot)) => host_log::say!("the guest asked for a reset"),
        Some(EndReason::Guest(End::TripleFault)) => host_log::say!("the guest crashed (triple fault)"),
        None if source.is_done() => host_log::say!("the log has no end record: the recorder was killed"),
        None => host_log::say!("stopped at --to {}", args.to.unwrap_or(at)),
    }
    let Landings { landed, retries, .. } = guest.machine.counts().landings;
    if landed + retries > 0 {
        host_log::say!(
            "{landed} positions landed on by counter; {retries} missed and tried again with twice the margin"
        );
    }
    if source.is_done() {
        warn_if_cut_off(source.records());
    }
    if let Some(at) = source.equal_until() {
        host_log::say!("every output and every state was equal, the last state at position {}", at.count);
    }
    Ok(())
}

/// A progress line on standard error, if that is a terminal.
struct Progress {
    bytes: u64,
    started: Instant,
    last: Option<Instant>,
}

impl Progress {
    fn new(log: &Path) -> Result<Progress, Error> {
        let bytes = File::open(log)
            .and_then(|f| f.metadata())
            .map_err(Error::host(format!("cannot read log {}", log.display())))?
            .len();
        let now = Instant::now();
        let last = std::io::IsTerminal::is_terminal(&std::io::stderr()).then_some(now);
        Ok(Progress { bytes, started: now, last })
    }

    fn show(&mut self, offset: u64, time_ns: u64) {
        if let Some(last) = &mut self.last
            && last.elapsed() > Duration::from_millis(500)
        {
            *last = Instant::now();
            let percent = offset * 100 / self.bytes.max(1);
            let speed = time_ns as f64 / 1e9 / self.started.elapsed().as_secs_f64();
            host_log::write_to_stderr(&format!(
                "\rreplaying: {percent} % of the log, {speed:.2} guest seconds a second"
            ));
        }
    }

    fn clear(&self) {
        if self.last.is_some() {
            host_log::write_to_stderr("\r\x1b[K");
        }
    }
}
