//! What operators and service managers ask of this side, and how it went: a handover, the end of the VM, the end of this
//! side. Each waits for its outcome, so that the words are true.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent::{Outcome, Phase, Role, StoreView};
use test_and_set::names::VmName;
use test_and_set::store::chain;
use tracing::warn;

use super::options::PairPlan;
use super::replica::{Replica, RequestProgress};
use super::report::ReplicaReport;

/// How long the outcome may take before the operator is told that there is none yet.
const PATIENCE: Duration = Duration::from_secs(20);

/// This side, as operators see it: with a replica, or a backup that waits for its primary.
pub struct Operated {
    vm: VmName,
    control: Option<PathBuf>,
    find: Box<dyn Fn() -> Option<Arc<Replica>> + Send + Sync>,
    stop_waiting: Box<dyn Fn() + Send + Sync>,
}

/// How a request went. The words name who runs the VM.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestOutcome {
    /// It was carried out.
    Done(String),
    /// Nothing was begun.
    Refused(String),
    /// It was begun and called off, or its outcome is not known: the words say which.
    NotDone(String),
}

/// What a handover needs the store for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreNeed {
    /// Without an answer of the store there is no handover.
    Required,
    /// The host is about to stop: a backup that lives without the store's record of it is better than none.
    Wanted,
}

impl Operated {
    /// A side: `find` returns its replica, or `None` while a backup waits for its primary; `stop_waiting` ends that.
    pub fn new(
        plan: &PairPlan,
        find: impl Fn() -> Option<Arc<Replica>> + Send + Sync + 'static,
        stop_waiting: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Operated> {
        let (vm, control) = (plan.name.clone(), plan.control.clone());
        Arc::new(Operated { vm, control, find: Box::new(find), stop_waiting: Box::new(stop_waiting) })
    }

    /// The replica; `None` while a backup waits for its primary.
    pub fn find(&self) -> Option<Arc<Replica>> {
        (self.find)()
    }

    /// The status of this side.
    pub fn report(&self) -> ReplicaReport {
        self.find().map_or_else(|| ReplicaReport::waiting(&self.vm), |replica| replica.report())
    }

    /// Hands the VM over to the backup.
    pub fn hand_over(&self, store: StoreNeed) -> RequestOutcome {
        let Some(replica) = self.find() else { return RequestOutcome::Refused(waiting_words(&self.vm)) };
        let status = replica.status();
        let peer = replica.peer_name();
        match (status.phase, status.role) {
            (Phase::Protected, Role::Primary) => {}
            (Phase::Protected, Role::Backup) => {
                return RequestOutcome::Refused(format!(
                    "this replica is the backup; ask the primary: run `vmft failover` on the host of {peer}"
                ));
            }
            _ => {
                return RequestOutcome::Refused(format!(
                    "there is no backup to hand the VM over to: {}",
                    replica.says()
                ));
            }
        }
        if let Some(why) = replica.ask_store_before_handover() {
            if store == StoreNeed::Required || !replica.can_yield() {
                return RequestOutcome::Refused(format!(
                    "a handover needs the store: {why}; the VM goes on here"
                ));
            }
            warn!("{why}; handing over without the store, since this host is to stop");
        }
        let begun = replica.hand_over();
        handover_answer(replica.wait_for_progress(Some(begun), PATIENCE), &replica, &peer)
    }

    /// Ends the VM's run on all its hosts.
    pub fn stop(&self) -> RequestOutcome {
        let Some(replica) = self.find() else { return RequestOutcome::Refused(waiting_words(&self.vm)) };
        let status = replica.status();
        match (status.phase, status.role) {
            (Phase::Alone, _) | (Phase::Protected, Role::Primary) => replica.stop(),
            (Phase::Protected, Role::Backup) => {
                let peer = replica.peer_name();
                return RequestOutcome::Refused(format!(
                    "this replica is the backup; ask the primary: run `vmft stop` on the host of {peer}, or give \
                     --this-host to end only this backup"
                ));
            }
            _ => return RequestOutcome::Refused(format!("nothing is stopped: {}", replica.says())),
        }
        match replica.wait_for_progress(None, PATIENCE) {
            RequestProgress::Out(Outcome::Ended(_)) => {
                RequestOutcome::Done(format!("VM {} has ended", self.vm))
            }
            RequestProgress::Out(outcome) => {
                RequestOutcome::NotDone(format!("this side has ended: {outcome}"))
            }
            _ => RequestOutcome::NotDone(format!(
                "VM {} no longer runs here, but the store has not recorded its end yet, and is asked again: {}",
                self.vm,
                replica.says()
            )),
        }
    }

    /// Ends this side: a primary hands over, a backup leaves. A side that is alone ends only if the VM may end with it.
    pub fn leave(&self, store: StoreNeed, may_end_vm: bool) -> RequestOutcome {
        let Some(replica) = self.find() else {
            (self.stop_waiting)();
            return RequestOutcome::Done(format!(
                "the backup of VM {} has stopped waiting for a primary",
                self.vm
            ));
        };
        let status = replica.status();
        match (status.phase, status.role) {
            (Phase::Protected, Role::Primary) => match self.hand_over(store) {
                // The backup was lost meanwhile.
                RequestOutcome::NotDone(_) if may_end_vm && replica.status().phase == Phase::Alone => {
                    self.stop()
                }
                answer => answer,
            },
            (Phase::Protected, Role::Backup) => {
                let begun = replica.hand_over();
                leave_answer(replica.wait_for_progress(Some(begun), PATIENCE), &replica)
            }
            // A primary that was started without a backup was meant to end with its host.
            (Phase::Alone, _) if may_end_vm || status.peer.is_none() => self.stop(),
            (Phase::Alone, _) => RequestOutcome::Refused(self.survivor_words()),
            (Phase::Starting, _) => {
                replica.leave(Outcome::Stopped);
                (self.stop_waiting)();
                RequestOutcome::Done("this side has ended before the guest ran".into())
            }
            (Phase::Deciding | Phase::Ending | Phase::Out, _) => {
                RequestOutcome::Refused(format!("not now: {}", replica.says()))
            }
        }
    }
}

impl Operated {
    /// Why a side that runs the VM alone does not end, and how to end it.
    fn survivor_words(&self) -> String {
        let how = match &self.control {
            Some(path) => format!("end it with `vmft stop --yes --control {}`", path.display()),
            None => {
                "kill this process by SIGKILL (it was started without --control), and then `vmft forget` it"
                    .into()
            }
        };
        format!(
            "VM {} runs on this side alone, and would end with it: what is only in its memory and its connections would \
             be lost. So it goes on. Shut the guest down, or {how}",
            self.vm
        )
    }
}

fn waiting_words(vm: &VmName) -> String {
    format!(
        "this backup waits for a primary of VM {vm}, and has no guest yet: start `vmft primary` on the other host"
    )
}

fn handover_answer(progress: RequestProgress, replica: &Replica, peer: &str) -> RequestOutcome {
    match progress {
        RequestProgress::Out(Outcome::HandedOver) => RequestOutcome::Done(format!(
            "handed over: the VM runs on the host of {peer}, alone; start a backup for it to be protected again"
        )),
        RequestProgress::Out(outcome) => RequestOutcome::NotDone(format!("this side has ended: {outcome}")),
        RequestProgress::Alone => RequestOutcome::NotDone(format!(
            "not handed over: {peer} was lost meanwhile, and the VM goes on here, alone and UNPROTECTED"
        )),
        RequestProgress::CalledOff => RequestOutcome::NotDone(format!(
            "not handed over: {peer} did not get ready within the timeout, and the VM goes on here, as before; look at \
             its lag in `vmft status`, and try again"
        )),
        RequestProgress::None => {
            RequestOutcome::NotDone(format!("no outcome in {PATIENCE:?}: {}", replica.says()))
        }
    }
}

fn leave_answer(progress: RequestProgress, replica: &Replica) -> RequestOutcome {
    match progress {
        RequestProgress::Out(outcome) => {
            RequestOutcome::Done(format!("this backup has ended ({outcome}); the primary goes on alone"))
        }
        RequestProgress::Alone => RequestOutcome::NotDone(
            "the primary handed the VM over just now: it runs here, alone, and this side does not leave"
                .into(),
        ),
        RequestProgress::CalledOff | RequestProgress::None => {
            RequestOutcome::NotDone(format!("no outcome in {PATIENCE:?}: {}", replica.says()))
        }
    }
}

impl Replica {
    /// Why the store could not decide between the sides of this pair; `None` if it can.
    fn ask_store_before_handover(&self) -> Option<String> {
        let status = self.status();
        if let Some(problem) = status.store_problem {
            return Some(problem.to_string());
        }
        let generation = status.generation?;
        match self.look_at_store() {
            Err(e) => Some(format!("the store does not answer: {}", chain(&e))),
            Ok(record) => match StoreView::of(record.as_ref(), generation, self.incarnation()) {
                StoreView::Ours => None,
                StoreView::Unknown => Some("the store has no record of this pair".into()),
                StoreView::Forgotten => Some("the VM was forgotten at the store".into()),
                StoreView::Overtaken(generation) => {
                    Some(format!("the VM was started as generation {generation}"))
                }
                StoreView::HeldByOther(holder) => Some(format!("the other side lives ({holder})")),
            },
        }
    }

    /// What this side is doing, in words for whoever asked for something that it cannot do now.
    fn says(&self) -> String {
        let (status, peer) = (self.status(), self.peer_name());
        match (status.phase, status.role) {
            (Phase::Starting, Role::Primary) => "this primary waits for its backup".into(),
            (Phase::Starting, Role::Backup) => "this backup meets its primary just now".into(),
            (Phase::Protected, _) => "the pair is protected".into(),
            (Phase::Deciding, _) => {
                format!("{peer} is lost, and the store has not decided yet which side lives; try again later")
            }
            (Phase::Alone, _) if status.peer.is_none() => "this primary was started without a backup".into(),
            (Phase::Alone, _) => format!("this side runs the VM alone, without {peer}"),
            (Phase::Ending, _) => "the VM is ending, or being handed over".into(),
            (Phase::Out, _) => "this side has ended".into(),
        }
    }
}
