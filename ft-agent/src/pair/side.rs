//! What both sides of a pair have in common before they meet and when they end: options, keys, store,
//! devices, signals.

use std::sync::Arc;

use agent::{Agent, Config, Outcome, Role};
use entry::End;
use entry::identity::Identity;
use entry::log::EndReason;
use test_and_set::blocking::BlockingStore;
use test_and_set::keeper::KeptFiles;
use test_and_set::keys::Keys;
use test_and_set::names::{Generation, Incarnation};
use test_and_set::record::Member;
use test_and_set::refusal_log::RefusalReasons;
use test_and_set::store::chain;
use test_and_set::url::StoreUrl;
use tracing::warn;
use vmm::Machine;

use super::announce::Announcer;
use super::console::copy_to_stdout;
use super::control::ControlSocket;
use super::guest_thread::GuestThread;
use super::hook::Hook;
use super::keeper;
use super::metrics;
use super::operated::Operated;
use super::options::PairPlan;
use super::replica::{Replica, now_ns};
use super::sidecar::Sidecars;
use crate::confine::{self, Needs, directory_of};
use crate::error::Error;
use crate::failpoint;
use crate::guest::Guest;
use crate::outside::console::Readers;
use crate::outside::tap::Tap;
use crate::outside::{ConsoleOut, Inlet, Outlet};

/// The slot of the network device, if there is one.
pub const NET_SLOT: u8 = 0;

/// How often the thread that watches a backup's tap looks whether the replica has ended, ms. A failure wakes it at once.
const TAP_WATCH_MS: u16 = 1000;

/// What a side needs to run a replica.
pub struct PairSide {
    /// The options.
    pub plan: PairPlan,
    /// This host's keys.
    pub keys: Arc<Keys>,
    /// The store.
    pub store: BlockingStore,
    /// Files and names of hosts, which the keeper uses for this side.
    pub files: KeptFiles,
    /// The guest's tap. It is opened at the start, so that going live does not depend on opening it.
    pub tap: Option<Arc<Tap>>,
    /// The sidecars of its disk images.
    pub sidecars: Sidecars,
    /// Which refusals of a peer are logged: it tries again twice a second.
    peer_refusals: Arc<RefusalReasons>,
    /// The user's command for each change between PROTECTED, AT RISK and UNPROTECTED.
    hook: Option<Hook>,
    /// The control socket, if the options ask for one. It is made before the process is confined.
    control: Option<ControlSocket>,
    /// The confinement of the guest's thread; `None` with `--no-confine`.
    confinement: Option<confine::GuestConfinement>,
}

impl PairSide {
    /// Opens what the side needs, and confines the process to that. To be called while the process has only
    /// one thread.
    ///
    /// # Errors
    /// An option is wrong, or the tap, a sidecar or the store cannot be opened.
    pub fn open(role: Role, plan: PairPlan) -> Result<PairSide, Error> {
        plan.store.parse::<StoreUrl>().map_err(|e| Error::config("store", chain(&e)))?;
        let tap = plan.machine.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?.map(Arc::new);
        let sidecars = Sidecars::read(&plan.name, &plan.machine.disks, plan.discard_newer)?;
        let hook = plan.hook.as_ref().map(|command| Hook::start(command, &plan)).transpose()?;
        let control = plan.control.as_deref().map(ControlSocket::create).transpose()?;
        let kept = keeper::start(role, &plan, sidecars.paths())?;
        // An error is told when the machine is made.
        plan.machine.engine.reserve(1).ok();
        let confinement = match plan.confine {
            true => Some(confine::process(&confinement_needs(&plan))),
            false => {
                warn!("this process is not confined, because of --no-confine");
                None
            }
        };
        let (keys, store, files) = kept.use_all()?;
        host_log::write_on_thread().map_err(Error::host("cannot start the log's thread"))?;
        failpoint::watch();
        let peer_refusals = Arc::default();
        Ok(PairSide {
            plan,
            keys: keys.into(),
            store,
            files,
            tap,
            sidecars,
            peer_refusals,
            hook,
            control,
            confinement,
        })
    }

    /// Starts the guest's thread, which makes the machine and is then confined. Returns the machine, ready to
    /// boot, and the thread.
    ///
    /// # Errors
    /// The files cannot be booted, or the host has not enough memory.
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

    /// Starts to answer on the control socket and to listen for scrapes of the metrics, as far as the options ask
    /// for them.
    ///
    /// # Errors
    /// A thread cannot be started, or the process cannot listen on the address for the metrics.
    pub fn start_control(&self, operated: &Arc<Operated>) -> Result<(), Error> {
        if let Some(address) = self.plan.metrics {
            let operated = operated.clone();
            metrics::listen(address, self.plan.name.clone(), move || operated.find())?;
        }
        self.control.as_ref().map_or(Ok(()), |control| control.serve(operated.clone()))
    }

    /// Makes the inlet report a guest that makes no exits for long: on KVM such a guest takes no inputs, and
    /// would otherwise seem stuck.
    pub fn watch_for_starvation(&self, inlet: &mut Inlet) {
        inlet.watch_for_starvation(self.plan.engine_unit(), self.plan.machine.starvation);
    }

    /// Makes the replica of a machine with this identity.
    ///
    /// # Errors
    /// A thread or an eventfd cannot be created.
    pub fn new_replica(
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
        };
        let mut readers = Readers::default();
        copy_to_stdout(readers.add())?;
        let mut outlet = Outlet::new(ConsoleOut::Readers(readers));
        let mut ports = Vec::new();
        if let (Some(tap), Some(net)) = (&self.tap, &plan.machine.net) {
            outlet.attach_tap(NET_SLOT, tap.clone());
            ports.push((tap.clone(), net.mac));
        }
        let agent = Agent::new(config, now_ns());
        let announcer = Announcer::new(ports);
        let (name, store) = (plan.name.clone(), self.store.clone());
        let (hook, refusals) = (self.hook.clone(), self.peer_refusals.clone());
        let replica = Replica::new(name, store, agent, outlet, announcer, hook, refusals)?;
        replica.watch_keys(self.keys.clone())?;
        Ok(replica)
    }

    /// Ends a backup whose tap is deleted: the primary then knows that it has no backup. The frames that come are for the
    /// primary's guest; nobody reads them here, and so nobody else would notice.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn watch_tap(&self, replica: &Arc<Replica>) -> Result<(), Error> {
        let Some(tap) = self.tap.clone() else { return Ok(()) };
        let replica = replica.clone();
        let watch = move || {
            while !replica.is_out() {
                if let Err(e) = tap.wait_for_failure(TAP_WATCH_MS.into()) {
                    return replica.fail(tap.failed(e));
                }
            }
        };
        let thread = std::thread::Builder::new().name("tap".into()).spawn(watch);
        thread.map(drop).map_err(Error::host("cannot start the thread that watches the tap"))
    }

    /// Writes the sidecars: the disk images are in use by this generation of the pair, or no longer in use.
    ///
    /// # Errors
    /// A sidecar cannot be written.
    pub fn mark_disks(&self, generation: Generation, in_use: bool) -> Result<(), Error> {
        self.sidecars.write(generation, in_use, |number, text| self.files.replace(number, text))
    }

    /// Ends a replica whose guest no longer runs here, and turns its outcome into the result of the command.
    /// `generation` is that of the pair, if it was opened. After an orderly end the disk images are marked as
    /// closed.
    ///
    /// # Errors
    /// The replica failed, was fenced or did not start, the guest crashed, or a sidecar cannot be written.
    pub fn conclude(
        &self,
        generation: Option<Generation>,
        replica: &Replica,
        outcome: Outcome,
        position: u64,
    ) -> Result<(), Error> {
        replica.guest_thread_done();
        replica.wait_for_askers();
        if let (Some(generation), Outcome::Ended(_) | Outcome::HandedOver) = (generation, &outcome) {
            self.mark_disks(generation, false)?;
        }
        match (outcome, replica.take_failure()) {
            (Outcome::Ended(EndReason::Guest(End::TripleFault)), _) => Err(Error::GuestCrash { position }),
            (Outcome::Ended(_) | Outcome::HandedOver | Outcome::Stopped, _) => Ok(()),
            (Outcome::Failed(_), Some(failure)) => Err(failure),
            (outcome, _) => Err(Error::Out(outcome)),
        }
    }
}

/// What a side still needs to open once it is confined.
fn confinement_needs(plan: &PairPlan) -> Needs {
    let kvm = plan.machine.engine.is_kvm();
    let peer_port = plan.peer.as_deref().and_then(|peer| peer.rsplit_once(':')?.1.parse().ok());
    Needs {
        devices: kvm.then(|| "/dev/kvm".into()).into_iter().collect(),
        make_in: failpoint::file().map(directory_of).into_iter().collect(),
        connect: peer_port.into_iter().collect(),
        listen: plan.listen.into_iter().chain(plan.metrics).map(|address| address.port()).collect(),
        kvm,
        ..Needs::default()
    }
}
