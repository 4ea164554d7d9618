//! What both sides do before they meet: keys, store, devices, signals.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent::{Agent, Config, Exit, Phase, Role};
use entry::identity::Identity;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use test_and_set::blocking::Blocking;
use test_and_set::keys::Keys;
use test_and_set::names::{Generation, Incarnation};
use test_and_set::record::Member;
use test_and_set::store::chain;
use test_and_set::url::StoreUrl;
use tracing::warn;
use tracing_subscriber::EnvFilter;
use vmm::Machine;

use super::announce::Announcer;
use super::console::{Readers, to_stdout};
use super::control::Control;
use super::guest_thread::GuestThread;
use super::hook::Hook;
use super::options::PairPlan;
use super::replica::{Replica, now_ns};
use super::sidecar::Sidecars;
use super::{metrics, quorum};
use crate::confine::{self, Needs};
use crate::error::Error;
use crate::failpoint;
use crate::guest::Guest;
use crate::outside::tap::Tap;
use crate::outside::{ConsoleOut, Inlet, Outlet};

/// Slot of the network device, if there is one.
pub const NET_SLOT: u8 = 0;

/// Structured logs on standard error; `VMFT_LOG` filters them (as `info` or `vmft=debug`).
pub fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("VMFT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(colours).with_env_filter(filter).init();
}

/// What a side has before it meets the other: both sides have the same.
pub struct Side {
    /// The options.
    pub plan: PairPlan,
    /// This host's keys.
    pub keys: Arc<Keys>,
    /// The store.
    pub store: Blocking,
    /// The guest's tap, open so that going live needs nothing more.
    pub tap: Option<Arc<Tap>>,
    /// Which copies its disks are.
    pub sidecars: Sidecars,
    /// The user's command for each change.
    hook: Option<Hook>,
    /// What the guest's thread may not do.
    confinement: Option<confine::GuestThread>,
}

impl Side {
    /// Opens what is needed, and confines the process to that. To be called on the only thread.
    ///
    /// # Errors
    /// A field of the options is wrong, or the tap cannot be opened.
    pub fn open(plan: PairPlan) -> Result<Side, Error> {
        let wrong_store = |e: &dyn std::error::Error| Error::config("store", chain(e));
        let url = plan.store.parse::<StoreUrl>().map_err(|e| wrong_store(&e))?;
        let keys = Keys::load(&plan.keys).map_err(|e| Error::config("keys", chain(&e)))?;
        let tap = plan.machine.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?.map(Arc::new);
        let sidecars = Sidecars::read(&plan.name, &plan.machine.disks, plan.discard_newer)?;
        let hook = plan.hook.as_ref().map(|command| Hook::start(command, plan.name.clone())).transpose()?;
        let confinement = match plan.confine {
            true => Some(confine::process(&needs(&plan, &url, &sidecars))),
            false => {
                warn!("not confined, as was asked for");
                None
            }
        };
        failpoint::watch();
        let store = Blocking::connect(&plan.store).map_err(|e| wrong_store(&e))?;
        std::thread::spawn(move || quorum::warn_if_lost_with_this_host(&url));
        Ok(Side { plan, keys: keys.into(), store, tap, sidecars, hook, confinement })
    }

    /// The machine at the start of its boot, and the thread that will run it.
    ///
    /// # Errors
    /// The files cannot be booted, or the host has no memory for it.
    pub fn boot(&self, guest: Guest) -> Result<(Machine, GuestThread), Error> {
        let thread = GuestThread::start()?;
        let confinement = self.confinement;
        let machine = thread.run(move || {
            let machine = guest.boot();
            if let Some(confinement) = confinement {
                confinement.confine();
            }
            machine
        });
        Ok((machine?, thread))
    }

    /// Listens on the control socket and for scrapes, where there are to be any.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn control(
        &self,
        find: impl Fn() -> Option<Arc<Replica>> + Clone + Send + Sync + 'static,
    ) -> Result<Option<Control>, Error> {
        if let Some(address) = self.plan.metrics {
            metrics::listen(address, self.plan.name.clone(), find.clone())?;
        }
        self.plan.control.as_deref().map(|path| Control::listen(path, find)).transpose()
    }

    /// Where a position is an exit of the guest or has to be sought, one that makes no exit must be seen to run all the same.
    pub fn watch_for_starvation(&self, inlet: &mut Inlet) {
        inlet.watch_for_starvation(self.plan.engine_unit(), self.plan.machine.starvation);
    }

    /// A replica of a machine with this identity.
    ///
    /// # Errors
    /// This host has no resources left.
    pub fn replica(
        &self,
        role: Role,
        identity: Identity,
        generation: Generation,
    ) -> Result<Arc<Replica>, Error> {
        let plan = &self.plan;
        let config = Config {
            role,
            vm: plan.name.clone(),
            me: Member { disks: self.sidecars.copies(), ..Member::new(Incarnation::random()) },
            identity,
            generation,
            unprotected: role == Role::Primary && plan.peer.is_none(),
            timing: plan.timing,
            buffers: plan.buffers,
            without: None,
        };
        let mut readers = Readers::default();
        to_stdout(readers.add())?;
        let mut outlet = Outlet::new(ConsoleOut::Readers(readers));
        let mut ports = Vec::new();
        if let (Some(tap), Some(net)) = (&self.tap, &plan.machine.net) {
            outlet.attach_tap(NET_SLOT, tap.clone());
            ports.push((tap.clone(), net.mac));
        }
        let agent = Agent::new(config, now_ns());
        let announcer = Announcer::new(ports);
        Replica::new(plan.name.clone(), self.store.clone(), agent, outlet, announcer, self.hook.clone())
    }
}

/// What a side still opens once it is confined.
fn needs(plan: &PairPlan, url: &StoreUrl, sidecars: &Sidecars) -> Needs {
    let kvm = plan.machine.engine.is_kvm();
    let beside = |path: &Path| match path.parent() {
        Some(dir) if dir != Path::new("") => dir.to_owned(),
        _ => PathBuf::from("."),
    };
    Needs {
        read: url.keys().map(Path::to_owned).into_iter().chain(["/dev/urandom".into()]).collect(),
        devices: kvm.then(|| "/dev/kvm".into()).into_iter().collect(),
        make_in: sidecars
            .paths()
            .chain(plan.control.as_deref())
            .chain(failpoint::file())
            .map(beside)
            .collect(),
        listen: plan.listen.into_iter().chain(plan.metrics).map(|address| address.port()).collect(),
        kvm,
    }
}

/// SIGTERM and SIGINT: a side that has another one hands over or leaves, one that is alone ends the VM's run.
///
/// # Errors
/// The signals cannot be caught.
pub fn leave_on_signals(replica: &Arc<Replica>) -> Result<(), Error> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Error::host("signal handlers"))?;
    let replica = replica.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            match replica.status().phase {
                Phase::Protected => replica.hand_over(),
                Phase::Alone => replica.stop(),
                Phase::Starting => replica.leave(Exit::Stopped),
                // It is ending, or has to wait for a verdict.
                Phase::Deciding | Phase::Ending | Phase::Out => {}
            }
        }
    });
    Ok(())
}
