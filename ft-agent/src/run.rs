//! `vmft run` and `vmft record`: a machine that is not protected, alone or with a log of what came into it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use entry::{End, Position, PositionUnit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use vmm::guest_loop::Turn;
use vmm::inbox::{Inbox, InboxSender};
use vmm::record::{Pace, Recorder};
use vmm::source::{Live, Outside, Source, Stops};
use vmm::{GuestLoop, Machine};

use crate::error::Error;
use crate::guest::Guest;
use crate::log_file::LogWriter;
use crate::options::{ClockMode, Plan, RunOptions};
use crate::outside::console::{Printer, read_keys};
use crate::outside::disk::Image;
use crate::outside::tap::Tap;
use crate::outside::terminal::RawMode;
use crate::outside::{ConsoleOut, Host, Inlet, Outlet};
use crate::summary::Summary;

/// What `vmft run` takes beside the machine itself.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    options: Options,
    /// Go on from a machine that was saved; its kernel, initrd, cmdline and devices must be given as they were
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,
}

/// What `vmft record` takes beside the machine itself.
#[derive(Args, Debug)]
pub struct RecordArgs {
    #[command(flatten)]
    options: Options,
    /// The log; must not exist yet
    #[arg(long, value_name = "FILE")]
    log: PathBuf,
}

/// What both take.
#[derive(Args, Debug)]
struct Options {
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
    /// Write the machine to --save exactly there, and go on; implies --clock virtual
    #[arg(long, value_name = "COUNT", requires = "save")]
    save_at: Option<u64>,
    /// File for --save-at
    #[arg(long, value_name = "FILE", requires = "save_at")]
    save: Option<PathBuf>,
    /// Write the summary to this file as JSON
    #[arg(long, value_name = "FILE")]
    summary_json: Option<PathBuf>,
}

/// Frames, keys and disk completions that may wait for the guest, of each device.
pub const INBOX_CAPACITY: usize = 1024;

/// Runs the guest to its end.
///
/// # Errors
/// The options, this host, or the guest's crash.
pub fn run(args: RunArgs) -> Result<(), Error> {
    let plan = args.options.machine.clone().check()?;
    let clock = args.options.clock(&plan)?;
    // A saved machine was made with the virtual clock (--save-at implies it): the one that goes on from it must have
    // the same epoch and seed.
    let origin = if args.restore.is_some() { ClockMode::Virtual } else { clock };
    let (guest, images) = Guest::new(&plan, origin)?;
    let mut machine = guest.boot()?;
    if let Some(path) = &args.restore {
        restore(&mut machine, path)?;
    }
    let session = Session::start(&args.options, &plan, clock, &machine, images)?;
    session.run(machine, |live| live)
}

/// Runs the guest to its end and logs what comes into it.
///
/// # Errors
/// As [`run`], or the log cannot be written.
pub fn record(args: RecordArgs) -> Result<(), Error> {
    let plan = args.options.machine.clone().check()?;
    let clock = args.options.clock(&plan)?;
    let (guest, images) = Guest::new(&plan, clock)?;
    // The identity has digests of all disks, which need not hold up the boot.
    let (machine, identity) = std::thread::scope(|scope| {
        let identity = scope.spawn(|| guest.identity());
        (guest.boot(), identity.join())
    });
    let identity = identity.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let machine = machine?;
    let log = LogWriter::create(&args.log, &identity)?;
    let session = Session::start(&args.options, &plan, clock, &machine, images)?;
    session.run(machine, |live| Recorder::new(live, log, Pace::FILE))
}

impl Options {
    fn clock(&self, plan: &Plan) -> Result<ClockMode, Error> {
        let exact = self.stop_at.is_some() || !self.digest_at.is_empty() || self.save_at.is_some();
        match plan.clock {
            None if exact => Ok(ClockMode::Virtual),
            Some(ClockMode::Host) if exact => {
                Err(Error::config("clock", "--stop-at, --digest-at and --save-at need --clock virtual"))
            }
            given => Ok(given.unwrap_or_default()),
        }
    }
}

/// A source whose inputs come from this host, recorded or not.
trait FromHost: Source<Error = Error> {
    fn live(&mut self) -> &mut Live<Host>;

    /// The run is over though the guest is not.
    fn stop(&mut self, machine: &mut Machine) -> Result<(), Error>;

    /// Nothing comes any more.
    fn finish(&mut self) -> Result<(), Error>;
}

impl FromHost for Live<Host> {
    fn live(&mut self) -> &mut Live<Host> {
        self
    }

    fn stop(&mut self, _machine: &mut Machine) -> Result<(), Error> {
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

impl FromHost for Recorder<Host, LogWriter> {
    fn live(&mut self) -> &mut Live<Host> {
        Recorder::live(self)
    }

    fn stop(&mut self, machine: &mut Machine) -> Result<(), Error> {
        Ok(Recorder::stop(self, machine)?)
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.log().finish()
    }
}

/// A host that is ready to run a guest: devices open, terminal raw, signals caught.
struct Session<'a> {
    options: &'a Options,
    live: Live<Host>,
    terminal: Option<RawMode>,
    signals: Handle,
}

impl<'a> Session<'a> {
    fn start(
        options: &'a Options,
        plan: &Plan,
        clock: ClockMode,
        machine: &Machine,
        images: Vec<Image>,
    ) -> Result<Session<'a>, Error> {
        let inbox = Inbox::new(machine.kicker(), INBOX_CAPACITY);
        let mut inlet = Inlet::new(inbox, clock, machine.time_ns(), 0)?;
        inlet.watch_for_starvation(plan.engine.unit(), plan.starvation);
        let mut host =
            Host { inlet, outlet: Outlet::new(ConsoleOut::Printer(Printer::new(options.until.clone()))) };
        attach(&mut host, plan, images)?;
        // A restored machine may have been saved while its disks were at work.
        for request in machine.unfinished_disk_requests() {
            host.disk(request)?;
        }
        let sender = host.inlet.sender().clone();
        let signals = stop_on_signals(&sender)?;
        let terminal = RawMode::enter().map_err(Error::host("terminal"))?;
        std::thread::spawn(move || read_keys(sender));
        // What a restored machine has behind it cannot be had again.
        let from = machine.position().count;
        let digests: BTreeSet<u64> =
            options.digest_at.iter().copied().filter(|count| *count >= from).collect();
        let stops = Stops { digests: digests.into_iter().map(Position::exact).collect(), pause: None };
        let live = Live::new(host, plan.engine.unit(), stops);
        Ok(Session { options, live, terminal, signals })
    }

    /// Runs the machine to its end, prints the summary, and turns the end into the command's.
    fn run<S: FromHost>(self, machine: Machine, source: impl FnOnce(Live<Host>) -> S) -> Result<(), Error> {
        let Session { options, live, terminal, signals } = self;
        let started = Instant::now();
        let from = machine.position().count;
        let mut guest = GuestLoop { source: source(live), machine };
        let ended = drive(&mut guest, options).and_then(|end| {
            guest.source.finish()?;
            Ok(end)
        });
        drop(terminal);
        signals.close();
        let traffic = guest.source.live().outside().traffic();
        let summary = Summary::new(&guest.machine, from, started.elapsed(), traffic);
        eprint!("{summary}");
        if let Some(path) = &options.summary_json {
            summary.write(path)?;
        }
        match ended? {
            Some(End::TripleFault) => Err(Error::GuestCrash { position: guest.machine.position().count }),
            _ => Ok(()),
        }
    }
}

fn attach(host: &mut Host, plan: &Plan, images: Vec<Image>) -> Result<(), Error> {
    let mut slot = 0;
    if let Some(net) = &plan.net {
        let tap = Arc::new(Tap::open(&net.tap)?);
        host.inlet.attach_tap(slot, tap.clone());
        host.outlet.attach_tap(slot, tap);
        slot += 1;
    }
    for (slot, image) in (slot..).zip(images) {
        host.inlet.attach_disk(slot, image);
    }
    Ok(())
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

/// Runs the guest until its end, `None` when it was stopped before.
fn drive<S: FromHost>(guest: &mut GuestLoop<S>, options: &Options) -> Result<Option<End>, Error> {
    let pauses: BTreeSet<u64> = options.save_at.into_iter().chain(options.stop_at).collect();
    let mut pauses = pauses.into_iter();
    loop {
        let pause = pauses.next();
        guest.source.live().pause_at(pause.map(Position::exact));
        if let Turn::Finished(end) = run_to_pause(guest)? {
            return Ok(Some(end));
        }
        let at = guest.machine.position();
        if let (Some(path), true) = (&options.save, options.save_at == Some(at.count)) {
            save(&mut guest.machine, path)?;
        }
        if pause != Some(at.count) || options.stop_at == pause {
            guest.source.stop(&mut guest.machine)?;
            return Ok(None);
        }
    }
}

/// Runs the guest until it pauses or ends, and says how far it is as long as it says nothing itself.
fn run_to_pause<S: FromHost>(guest: &mut GuestLoop<S>) -> Result<Turn, Error> {
    loop {
        match guest.turn()? {
            Turn::Again if guest.machine.unit() == PositionUnit::Instructions => {
                let count = guest.machine.position().count;
                if let ConsoleOut::Printer(printer) = guest.source.live().outside().outlet.console() {
                    printer.show_progress(count);
                }
            }
            Turn::Again => {}
            turn => return Ok(turn),
        }
    }
}

fn save(machine: &mut Machine, path: &Path) -> Result<(), Error> {
    let failed = || Error::host(path.display().to_string());
    let file = File::create(path).map_err(failed())?;
    let mut file = BufWriter::new(file);
    machine.save(&mut file).map_err(std::io::Error::other).map_err(failed())?;
    let file = file.into_inner().map_err(|e| e.into_error()).map_err(failed())?;
    file.sync_all().map_err(failed())
}

fn restore(machine: &mut Machine, path: &Path) -> Result<(), Error> {
    let unusable = |e: &dyn std::fmt::Display| Error::config("restore", format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(|e| unusable(&e))?;
    machine.restore(&mut BufReader::new(file)).map_err(|e| unusable(&e))
}
