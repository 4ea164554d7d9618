//! `vmft primary`: runs the guest, and records it for its backup.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::{Event, Outcome, Role};
use entry::log::EndReason;
use test_and_set::names::Generation;
use test_and_set::record::VmPhase;
use test_and_set::refusal_log::RefusalReasons;
use test_and_set::store::chain;
use tracing::{info, warn};
use vmm::guest_loop::Turn;
use vmm::inbox::Inbox;
use vmm::record::{LogIntervals, Recorder};
use vmm::source::{Live, PlannedStops};
use vmm::{GuestLoop, Machine};

use super::go_live::run_alone;
use super::guest_io::{ChannelLog, GatedOutside, log_full_state};
use super::guest_thread::GuestThread;
use super::hosts;
use super::link::{PeerLink, PeerLinkError};
use super::operated::Operated;
use super::options::PairPlan;
use super::replica::{Duty, Replica};
use super::side::{NET_SLOT, PairSide};
use super::signals::Signals;
use crate::error::Error;
use crate::guest::Guest;
use crate::outside::{INBOX_CAPACITY, Inlet};
use crate::service;

/// How long connecting to the backup may take, including the TLS handshake.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two attempts to reach the backup.
const RETRY: Duration = Duration::from_millis(500);
/// The same while one of them refuses the other.
const RETRY_MAX: Duration = Duration::from_secs(15);
/// How long the store may take to return the VM's record.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// Runs a primary until the VM or this side ends.
///
/// # Errors
/// The same as for [`super::primary()`].
pub fn run(plan: PairPlan) -> Result<(), Error> {
    let signals = Signals::catch()?;
    let clock = plan.clock();
    let (guest, images) = Guest::new(&plan.machine, clock)?;
    let identity = guest.identity()?;
    let side = PairSide::open(Role::Primary, plan)?;
    let (machine, thread) = side.boot(guest)?;
    let generation = next_generation(&side)?;
    let inbox = Inbox::new(machine.kicker(), INBOX_CAPACITY);
    let replica = side.new_replica(Role::Primary, identity, generation)?;
    replica.set_guest(inbox.1.clone());
    let controlled = replica.clone();
    let operated = Operated::new(&side.plan, move || Some(controlled.clone()), || {});
    side.start_control(&operated)?;
    signals.obey(operated)?;
    if let Some(peer) = &side.plan.peer {
        keep_connecting(&side, peer, &replica)?;
    }
    if let Err(outcome) = replica.wait_started(false) {
        return side.conclude(None, &replica, outcome, 0);
    }
    side.mark_disks(generation, true)?;
    let mut inlet = Inlet::new(inbox, clock, machine.time_ns(), 0)?;
    side.watch_for_starvation(&mut inlet);
    if let Some(tap) = &side.tap {
        inlet.attach_tap(NET_SLOT, tap.clone());
    }
    let first_disk = side.tap.is_some() as u8;
    for (slot, image) in (first_disk..).zip(images) {
        inlet.attach_disk(slot, image);
    }
    let unit = side.plan.engine_unit();
    let live = Live::new(GatedOutside { inlet, replica: replica.clone() }, unit, PlannedStops::default());
    let (outcome, machine) = record_guest(&replica, &thread, machine, live);
    side.conclude(Some(generation), &replica, outcome, machine.position().count)
}

/// The generation of the pair that starts now, by the store's record of the VM.
fn next_generation(side: &PairSide) -> Result<Generation, Error> {
    let name = &side.plan.name;
    let record = side.store.get(name, STORE_PATIENCE);
    let record = record.map_err(|e| Error::config("store", chain(&e)))?;
    // Which copy is the newest is for somebody to know whose VM does not run.
    if let Some(record) = record.as_ref().filter(|record| record.phase != VmPhase::Forgotten) {
        let (vm, store, by) = (name.clone(), side.plan.store.clone(), hosts::running(record));
        return Err(Error::RunsElsewhere { vm, generation: record.generation, by, store });
    }
    side.sidecars.check_newest(record.as_ref())?;
    let Some(record) = record else { return Ok(Generation::FIRST) };
    let refusal = hosts::refusal(&side.store, Some(&record), side.keys.own().certificate(), STORE_PATIENCE);
    if let Some(refusal) = refusal.map_err(|e| Error::config("store", chain(&e)))? {
        return Err(Error::Out(Outcome::OpenRefused(refusal.to_string())));
    }
    record.next_generation().ok_or_else(|| {
        Error::config("name", "this VM has used up all generation numbers; give it another name")
    })
}

/// Tries to connect to the backup, on a thread of its own, until the pair is open or this side ends.
fn keep_connecting(side: &PairSide, peer: &str, replica: &Arc<Replica>) -> Result<(), Error> {
    let tls = test_and_set::tls::peer_client(&side.keys).map_err(|e| Error::config("keys", chain(&e)))?;
    let (peer, replica, keys, names) =
        (peer.to_owned(), replica.clone(), side.keys.clone(), side.files.clone());
    let dial = move || {
        let failures = RefusalReasons::default();
        let mut pause = RETRY;
        while replica.is_starting() {
            let mut answers = replica.is_connected();
            if !answers {
                let connected =
                    names.resolve(&peer).map_err(|e| PeerLinkError::Connect(std::io::Error::other(e)));
                let connected = connected
                    .and_then(|addresses| PeerLink::connect(&addresses, tls.clone(), &keys, PATIENCE));
                match connected {
                    Ok(link) => {
                        answers = true;
                        replica.connected(link, &[]);
                    }
                    Err(e) if failures.refused(&e.to_string(), Instant::now()).is_some() => {
                        warn!("no connection to backup {peer} yet: {e}; trying again");
                    }
                    Err(_) => {}
                }
            }
            std::thread::sleep(pause);
            // What one side refuses in the other's options stays as it is until somebody changes them, and ends a side
            // for that.
            pause = match answers && replica.is_refused() {
                true => (pause * 2).min(RETRY_MAX),
                false => RETRY,
            };
        }
    };
    info!("waiting for the backup");
    service::start("dial", dial)
}

/// Runs the guest and records it; once this side is alone, runs the guest without a log. Returns how this
/// side ended, and the machine.
fn record_guest(
    replica: &Arc<Replica>,
    thread: &GuestThread,
    machine: Machine,
    live: Live<GatedOutside>,
) -> (Outcome, Machine) {
    let source = Recorder::new(live, ChannelLog(replica.clone()), LogIntervals::BACKUP);
    let mut guest = GuestLoop { machine, source };
    loop {
        let turn;
        (turn, guest) = thread.run_with(guest, GuestLoop::run);
        match turn {
            Ok(Turn::Finished(end)) => {
                replica.guest_ended(EndReason::Guest(end));
                return (replica.wait_outcome(), guest.machine);
            }
            Ok(_) => {}
            Err(e) => {
                replica.fail(e.into());
                return (replica.wait_outcome(), guest.machine);
            }
        }
        let duty = match replica.next_duty(false) {
            Duty::HandOver => hand_over(replica, &mut guest),
            duty => duty,
        };
        match duty {
            Duty::Run | Duty::HandOver => {}
            Duty::Alone => {
                let GuestLoop { machine, source } = guest;
                return run_alone(replica, thread, GuestLoop { machine, source: source.into_live() });
            }
            Duty::Stop => {
                if let Err(e) = guest.source.stop(&mut guest.machine) {
                    replica.fail(e.into());
                }
                replica.guest_ended(EndReason::Stopped);
                return (replica.wait_outcome(), guest.machine);
            }
            Duty::Leave(outcome) => return (outcome, guest.machine),
        }
    }
}

/// Hands over: appends a digest of the guest's state to the log, so that the backup goes on only from the
/// same state. Returns what to do next.
fn hand_over(replica: &Arc<Replica>, guest: &mut GuestLoop<Recorder<GatedOutside, ChannelLog>>) -> Duty {
    let GuestLoop { machine, source } = guest;
    if let Err(e) = source.append_state(machine) {
        replica.fail(e.into());
    }
    log_full_state(machine);
    replica.handle(Event::HandOver);
    replica.next_duty(false)
}
