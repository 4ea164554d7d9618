//! `vmft run` and `vmft record`: a machine without protection; `record` also logs its inputs.

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
use vmm::record::{LogIntervals, Recorder};
use vmm::source::{Live, Outside, PlannedStops, Source};
use vmm::{GuestLoop, Machine};

use crate::confine::{self, Needs, directory_of};
use crate::error::Error;
use crate::guest::Guest;
use crate::log_file::LogWriter;
use crate::options::{ClockMode, GuestPlan, RunOptions};
use crate::outside::console::{Printer, read_keys};
use crate::outside::disk::Image;
use crate::outside::tap::Tap;
use crate::outside::terminal::RawMode;
use crate::outside::{ConsoleOut, Host, INBOX_CAPACITY, Inlet, Outlet};
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
    /// End the run with success once the guest has printed this text
    #[arg(long, value_name = "TEXT")]
    until: Option<String>,
    /// Stop after exactly this many retired instructions; implies --clock virtual
    #[arg(long, value_name = "COUNT")]
    stop_at: Option<u64>,
    /// Print a digest of the whole machine after exactly this many retired instructions; implies --clock virtual
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
    let plan = args.options.machine.clone().check()?;
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
    let plan = args.options.machine.clone().check()?;
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
    fn clock(&self, plan: &GuestPlan) -> Result<ClockMode, Error> {
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
    terminal: Option<RawMode>,
    signals: Handle,
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
        options.confine(plan);
        let inbox = Inbox::new(machine.kicker(), INBOX_CAPACITY);
        let mut inlet = Inlet::new(inbox, clock, machine.time_ns(), 0)?;
        inlet.watch_for_starvation(plan.engine.unit(), plan.starvation);
        let mut host =
            Host { inlet, outlet: Outlet::new(ConsoleOut::Printer(Printer::new(options.until.clone()))) };
        attach(&mut host, tap, images);
        // A restored machine may have been saved with disk requests under way.
        for request in machine.unfinished_disk_requests() {
            host.disk(request)?;
        }
        let sender = host.inlet.sender().clone();
        let signals = stop_on_signals(&sender)?;
        let terminal = RawMode::enter().map_err(Error::host("cannot set the terminal to raw mode"))?;
        std::thread::spawn(move || read_keys(sender));
        // A restored machine cannot give digests of positions that it has already passed.
        let from = machine.position().count;
        let digests: BTreeSet<u64> =
            options.digest_at.iter().copied().filter(|count| *count >= from).collect();
        let stops = PlannedStops { digests: digests.into_iter().map(Position::exact).collect(), pause: None };
        let live = Live::new(host, plan.engine.unit(), stops);
        Ok(Session { options, live, terminal, signals })
    }

    /// Runs the machine to its end, prints the summary, and returns the command's result.
    fn run<S: HostSource>(self, machine: Machine, source: impl FnOnce(Live<Host>) -> S) -> Result<(), Error> {
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
        host_log::write_to_stderr(&summary.to_string());
        if let Some(path) = &options.summary_json {
            summary.write(path)?;
        }
        match ended? {
            Some(End::TripleFault) => Err(Error::GuestCrash { position: guest.machine.position().count }),
            _ => Ok(()),
        }
    }
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

/// SIGINT and SIGTERM end the run in an orderly way.
fn stop_on_signals(sender: &InboxSender) -> Result<Handle, Error> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM]).map_err(Error::host("cannot install signal handlers"))?;
    let handle = signals.handle();
    let sender = sender.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            sender.stop();
        }
    });
    Ok(handle)
}

/// Runs the guest to its end; `None` if it was stopped before.
fn drive<S: HostSource>(guest: &mut GuestLoop<S>, options: &CommonArgs) -> Result<Option<End>, Error> {
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
    let file = File::create(path).map_err(failed())?;
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
