//! `vmft run` and `vmft record`: a machine without protection; `record` also logs its inputs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use entry::{End, Position, PositionUnit};
use vmm::guest_loop::Turn;
use vmm::inbox::{Inbox, InboxSender};
use vmm::record::{LogIntervals, Recorder};
use vmm::source::{Live, Outside, PlannedStops, Source};
use vmm::{GuestLoop, Machine};

use crate::confine::{self, Needs, directory_of};
use crate::error::Error;
use crate::guest::Guest;
use crate::log_file::LogWriter;
use crate::options::{ClockMode, GuestPlan, RunOptions};
use crate::outside::console::{Printer, pass_keys};
use crate::outside::disk::Image;
use crate::outside::tap::Tap;
use crate::outside::terminal::{IgnoredSignals, OnSignal, Terminal};
use crate::outside::until::{Awaited, Until};
use crate::outside::{ConsoleOut, Host, INBOX_CAPACITY, Inlet, Outlet};
use crate::private_file;
use crate::summary::Summary;

/// Arguments of `vmft run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    options: CommonArgs,
    /// Continue from a state saved by --save-at; give the same kernel, initrd, cmdline and devices as the run that saved it
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,
}

/// Arguments of `vmft record`.
#[derive(Args, Debug)]
pub struct RecordArgs {
    #[command(flatten)]
    options: CommonArgs,
    /// Write the log to this file, which must not exist yet
    #[arg(long, value_name = "FILE")]
    log: PathBuf,
}

/// Arguments of both commands.
#[derive(Args, Debug)]
struct CommonArgs {
    #[command(flatten)]
    machine: RunOptions,
    /// End the run with success once the guest has printed this text. It is given up with exit code 9 when the guest ends
    /// without it, or rests while nothing can reach it, or after --within
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    until: Option<String>,
    /// With --until: how many seconds to wait at most, also for a guest that rests [default: 600]
    #[arg(long, value_name = "S", requires = "until")]
    within: Option<u64>,
    /// Stop after exactly this many retired instructions; implies --clock virtual
    #[arg(long, value_name = "COUNT")]
    stop_at: Option<u64>,
    /// Take a digest of the whole machine after exactly this many retired instructions; implies --clock virtual. Digests are
    /// in --summary-json, and in lines "digest POSITION DIGEST" on standard error
    #[arg(long, value_name = "COUNT,...", value_delimiter = ',')]
    digest_at: Vec<u64>,
    /// Save the machine to the file --save after exactly this many retired instructions, and go on; implies --clock virtual
    #[arg(long, value_name = "COUNT", requires = "save")]
    save_at: Option<u64>,
    /// The file that --save-at writes
    #[arg(long, value_name = "FILE", requires = "save_at")]
    save: Option<PathBuf>,
    /// Also write the summary to this file, as JSON
    #[arg(long, value_name = "FILE")]
    summary_json: Option<PathBuf>,
    /// For debugging: do not confine the process with seccomp and Landlock
    #[arg(long)]
    no_confine: bool,
}

/// Runs the guest to its end.
///
/// # Errors
/// The options are wrong, this host fails, or the guest crashes.
pub fn run(args: RunArgs) -> Result<(), Error> {
    let plan = args.options.machine.clone().check(None)?;
    let clock = args.options.clock(&plan)?;
    // A saved machine ran with the virtual clock (--save-at implies it), and the machine that continues from it needs the
    // same epoch and seed.
    let origin = if args.restore.is_some() { ClockMode::Virtual } else { clock };
    let (guest, images) = Guest::new(&plan, origin)?;
    let mut machine = guest.boot()?;
    if let Some(path) = &args.restore {
        restore(&mut machine, path)?;
    }
    let session = Session::start(&args.options, &plan, clock, &machine, images)?;
    session.run(machine, |live| live)
}

/// Runs the guest to its end and logs its inputs.
///
/// # Errors
/// The same as for [`run`], or the log cannot be written.
pub fn record(args: RecordArgs) -> Result<(), Error> {
    let plan = args.options.machine.clone().check(None)?;
    let clock = args.options.clock(&plan)?;
    let (guest, images) = Guest::new(&plan, clock)?;
    // The identity has digests of all disks; the boot does not wait for them.
    let (machine, identity) = std::thread::scope(|scope| {
        let identity = scope.spawn(|| guest.identity());
        (guest.boot(), identity.join())
    });
    let identity = identity.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let machine = machine?;
    let log = LogWriter::create(&args.log, &identity)?;
    let session = Session::start(&args.options, &plan, clock, &machine, images)?;
    session.run(machine, |live| Recorder::new(live, log, LogIntervals::FILE))
}

impl CommonArgs {
    /// Refuses positions that the run does not come to.
    fn check_stops(&self) -> Result<(), Error> {
        let Some(end) = self.stop_at else { return Ok(()) };
        let late = |field, at: u64| {
            Error::config(field, format!("the run stops at {end} (--stop-at) and does not come to {at}"))
        };
        match (self.digest_at.iter().find(|at| **at > end), self.save_at.filter(|at| *at > end)) {
            (Some(at), _) => Err(late("digest-at", *at)),
            (_, Some(at)) => Err(late("save-at", at)),
            _ => Ok(()),
        }
    }

    /// The text that ends the run.
    fn awaited(&self) -> Option<Awaited> {
        let text = self.until.clone()?;
        Some(Awaited { text, within: self.within.map(Duration::from_secs) })
    }

    /// Says which results were not obtained, because the run has ended before.
    fn tell_unreached(&self, end: u64) {
        for at in self.digest_at.iter().filter(|at| **at > end) {
            host_log::say!("no digest at {at}: the run has ended at {end}");
        }
        for at in self.save_at.iter().filter(|at| **at > end) {
            host_log::say!("the machine was not saved at {at}: the run has ended at {end}");
        }
    }

    fn clock(&self, plan: &GuestPlan) -> Result<ClockMode, Error> {
        self.check_stops()?;
        let exact = self.stop_at.is_some() || !self.digest_at.is_empty() || self.save_at.is_some();
        match plan.clock {
            None if exact => Ok(ClockMode::Virtual),
            Some(ClockMode::Host) if exact => Err(Error::config(
                "clock",
                "--stop-at, --digest-at and --save-at need the virtual clock: give --clock virtual, or leave --clock out",
            )),
            given => Ok(given.unwrap_or_default()),
        }
    }

    /// Confines the process to what the run still has to open. To be called while the process has only one thread.
    fn confine(&self, plan: &GuestPlan) {
        if !self.no_confine {
            confine::lone_process(&Needs {
                make_in: self.save.iter().chain(&self.summary_json).map(|p| directory_of(p)).collect(),
                kvm: plan.engine.is_kvm(),
                ..Needs::default()
            });
        }
    }
}

/// A source that takes inputs from this host, recorded or not.
trait HostSource: Source<Error = Error> {
    /// The source without its recorder.
    fn live(&mut self) -> &mut Live<Host>;

    /// Ends the run although the guest could go on.
    fn stop(&mut self, machine: &mut Machine) -> Result<(), Error>;

    /// Completes the log; nothing is recorded after this.
    fn finish(&mut self) -> Result<(), Error>;
}

impl HostSource for Live<Host> {
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

impl HostSource for Recorder<Host, LogWriter> {
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

/// A host that is ready to run a guest: its devices are open, its terminal is raw, signals are caught.
struct Session<'a> {
    options: &'a CommonArgs,
    live: Live<Host>,
    terminal: Terminal,
}

impl<'a> Session<'a> {
    fn start(
        options: &'a CommonArgs,
        plan: &GuestPlan,
        clock: ClockMode,
        machine: &Machine,
        images: Vec<Image>,
    ) -> Result<Session<'a>, Error> {
        let tap = plan.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?;
        let ignored = IgnoredSignals::read();
        options.confine(plan);
        let inbox = Inbox::new(machine.kicker(), INBOX_CAPACITY);
        let mut inlet = Inlet::new(inbox, clock, machine.time_ns(), 0)?;
        inlet.watch_for_starvation(plan.engine.unit(), plan.starvation);
        let until = options.awaited().map(|text| Until::new(text, plan.net.is_some(), Instant::now()));
        let keys_ended = until.as_ref().map(Until::keys_ended).unwrap_or_default();
        let outlet = Outlet::new(ConsoleOut::Printer(Printer::new(options.until.clone())));
        let mut host = Host { inlet, outlet, until, hopeless: None, digests: Vec::new() };
        attach(&mut host, tap, images);
        // A restored machine may have been saved with disk requests under way.
        for request in machine.unfinished_disk_requests() {
            host.disk(request)?;
        }
        let sender = host.inlet.sender().clone();
        let terminal = Terminal::attach(ignored, stop_on_signals(sender.clone()))?;
        let keys = terminal.keys();
        std::thread::spawn(move || {
            pass_keys(keys, &sender);
            keys_ended.store(true, Ordering::Relaxed);
        });
        // A restored machine cannot give digests of positions that it has already passed.
        let from = machine.position().count;
        let digests: BTreeSet<u64> =
            options.digest_at.iter().copied().filter(|count| *count >= from).collect();
        let stops = PlannedStops { digests: digests.into_iter().map(Position::exact).collect(), pause: None };
        let live = Live::new(host, plan.engine.unit(), stops);
        Ok(Session { options, live, terminal })
    }

    /// Runs the machine to its end, prints the summary, and returns the command's result.
    fn run<S: HostSource>(self, machine: Machine, source: impl FnOnce(Live<Host>) -> S) -> Result<(), Error> {
        let Session { options, live, terminal } = self;
        let started = Instant::now();
        let from = machine.position().count;
        let mut guest = GuestLoop { source: source(live), machine };
        let ended = drive(&mut guest, options);
        let finished = guest.source.finish();
        drop(terminal);
        let end = guest.machine.position().count;
        let host = guest.source.live().outside();
        let mut summary = Summary::new(&guest.machine, from, started.elapsed(), host.traffic());
        summary.digests = std::mem::take(&mut host.digests);
        host_log::write_to_stderr(&summary.to_string());
        options.tell_unreached(end);
        let written = options.summary_json.as_ref().map_or(Ok(()), |path| summary.write(path));
        let ended = ended?;
        finished?;
        written?;
        match (ended, unprinted(host, ended)) {
            (Some(End::TripleFault), _) => Err(Error::GuestCrash { position: end }),
            (_, unprinted) => unprinted,
        }
    }
}

/// Whether the guest has printed what the user waits for, if anything.
fn unprinted(host: &mut Host, ended: Option<End>) -> Result<(), Error> {
    let (Some(until), ConsoleOut::Printer(printer)) = (&host.until, host.outlet.console()) else {
        return Ok(());
    };
    if printer.is_satisfied() {
        return Ok(());
    }
    let why = match (&host.hopeless, ended) {
        (Some(why), _) => why.clone(),
        (None, Some(_)) => "it has ended".into(),
        (None, None) => "the run was stopped".into(),
    };
    Err(Error::NotPrinted { text: until.text().into(), why })
}

fn attach(host: &mut Host, tap: Option<Tap>, images: Vec<Image>) {
    let mut slot = 0;
    if let Some(tap) = tap.map(Arc::new) {
        host.inlet.attach_tap(slot, tap.clone());
        host.outlet.attach_tap(slot, tap);
        slot += 1;
    }
    for (slot, image) in (slot..).zip(images) {
        host.inlet.attach_disk(slot, image);
    }
}

/// Time from the first signal, which ends the run in order, until another one ends the process, in case the run is stuck.
const IMPATIENCE: Duration = Duration::from_secs(1);

/// A signal ends the run in order, and another one, later, ends the process.
fn stop_on_signals(sender: InboxSender) -> impl FnMut() -> OnSignal {
    let mut first = None;
    move || {
        if first.get_or_insert_with(Instant::now).elapsed() > IMPATIENCE {
            return OnSignal::End;
        }
        sender.stop();
        OnSignal::Handled
    }
}

/// Runs the guest to its end; `None` if it was stopped before.
fn drive<S: HostSource>(guest: &mut GuestLoop<S>, options: &CommonArgs) -> Result<Option<End>, Error> {
    let pauses: BTreeSet<u64> = options.save_at.into_iter().chain(options.stop_at).collect();
    let mut pauses = pauses.into_iter();
    loop {
        let pause = pauses.next();
        guest.source.live().pause_at(pause.map(Position::exact));
        if let Turn::Finished(end) = run_to_pause(guest)? {
            guest.source.live().outside().inlet.finish()?;
            return Ok(Some(end));
        }
        let at = guest.machine.position();
        if let (Some(path), true) = (&options.save, options.save_at == Some(at.count)) {
            save(&mut guest.machine, path)?;
        }
        if pause != Some(at.count) || options.stop_at == pause {
            // A device that has failed also stops the run.
            guest.source.live().outside().inlet.finish()?;
            guest.source.stop(&mut guest.machine)?;
            return Ok(None);
        }
    }
}

/// Runs the guest until it pauses or ends, and shows progress until the guest prints something.
fn run_to_pause<S: HostSource>(guest: &mut GuestLoop<S>) -> Result<Turn, Error> {
    loop {
        match guest.run_once()? {
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
    let failed = || Error::host(format!("cannot save the machine to {}", path.display()));
    let file = private_file::create(path).map_err(failed())?;
    let mut file = BufWriter::new(file);
    machine.save(&mut file).map_err(std::io::Error::other).map_err(failed())?;
    let file = file.into_inner().map_err(|e| e.into_error()).map_err(failed())?;
    file.sync_all().map_err(failed())
}

fn restore(machine: &mut Machine, path: &Path) -> Result<(), Error> {
    let unusable = |e: &dyn std::fmt::Display| {
        Error::config("restore", format!("cannot restore the machine from {}: {e}", path.display()))
    };
    let file = File::open(path).map_err(|e| unusable(&e))?;
    machine.restore(&mut BufReader::new(file)).map_err(|e| unusable(&e))
}
