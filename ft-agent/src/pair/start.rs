//! What both sides do before they meet: keys, store, devices, signals.

use std::io::IsTerminal;
use std::sync::Arc;

use agent::{Agent, Config, Exit, Phase, Role};
use entry::PositionUnit;
use entry::identity::Identity;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use test_and_set::blocking::Blocking;
use test_and_set::keys::Keys;
use test_and_set::names::{Generation, Incarnation};
use test_and_set::record::Member;
use test_and_set::store::chain;
use test_and_set::url::StoreUrl;
use tracing_subscriber::EnvFilter;

use super::announce::Announcer;
use super::console::{Readers, to_stdout};
use super::control::Control;
use super::hook::Hook;
use super::options::PairPlan;
use super::replica::{Replica, now_ns};
use super::sidecar::Sidecars;
use super::{metrics, quorum};
use crate::error::Error;
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
}

impl Side {
    /// Opens what is needed.
    ///
    /// # Errors
    /// A field of the options is wrong, or the tap cannot be opened.
    pub fn open(plan: PairPlan) -> Result<Side, Error> {
        let keys = Keys::load(&plan.keys).map_err(|e| Error::config("keys", chain(&e)))?;
        let store = Blocking::connect(&plan.store).map_err(|e| Error::config("store", chain(&e)))?;
        if let Ok(url) = plan.store.parse::<StoreUrl>() {
            std::thread::spawn(move || quorum::warn_if_lost_with_this_host(&url));
        }
        let tap = plan.machine.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?.map(Arc::new);
        let sidecars = Sidecars::read(&plan.name, &plan.machine.disks, plan.discard_newer)?;
        Ok(Side { plan, keys: keys.into(), store, tap, sidecars })
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

    /// Where positions are the guest's exits, one that makes none must be seen to run all the same.
    pub fn watch_for_starvation(&self, inlet: &mut Inlet) {
        if self.plan.engine_unit() == PositionUnit::SynchronousExits {
            inlet.watch_for_starvation(self.plan.machine.starvation);
        }
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
        let hook = plan.hook.clone().map(|command| Hook::start(command, plan.name.clone())).transpose()?;
        Replica::new(plan.name.clone(), self.store.clone(), agent, outlet, Announcer::new(ports), hook)
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
