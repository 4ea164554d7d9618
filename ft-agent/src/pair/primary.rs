//! `vmft primary`: runs the guest, and records it for its backup.

use std::sync::Arc;
use std::time::Duration;

use agent::{Event, Exit, Role};
use entry::log::EndReason;
use test_and_set::names::Generation;
use test_and_set::record::Phase;
use test_and_set::store::chain;
use tracing::{info, warn};
use vmm::guest_loop::Turn;
use vmm::inbox::Inbox;
use vmm::record::{Pace, Recorder};
use vmm::source::{Live, Stops};
use vmm::{GuestLoop, Machine};

use super::go_live::run_alone;
use super::guest::{ChannelLog, Guarded, log_full_state};
use super::guest_thread::GuestThread;
use super::link::Link;
use super::options::PairPlan;
use super::replica::{Duty, Replica};
use super::start::{NET_SLOT, Side, leave_on_signals};
use crate::error::Error;
use crate::guest::Guest;
use crate::outside::Inlet;
use crate::run::INBOX_CAPACITY;

/// How long the backup may take to shake hands.
const PATIENCE: Duration = Duration::from_secs(5);
/// Before a backup that is not there is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// How long the store may take to say what it knows.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// Runs a primary to its end.
///
/// # Errors
/// As [`super::primary`].
pub fn run(plan: PairPlan) -> Result<(), Error> {
    let clock = plan.clock();
    let (guest, images) = Guest::new(&plan.machine, clock)?;
    let identity = guest.identity()?;
    let side = Side::open(plan)?;
    let (machine, thread) = side.boot(guest)?;
    let generation = next_generation(&side)?;
    let inbox = Inbox::new(machine.kicker(), INBOX_CAPACITY);
    let replica = side.replica(Role::Primary, identity, generation)?;
    replica.set_guest(inbox.1.clone());
    let controlled = replica.clone();
    let _control = side.control(move || Some(controlled.clone()))?;
    leave_on_signals(&replica)?;
    if let Some(peer) = &side.plan.peer {
        connect(&side, peer, &replica)?;
    }
    if let Err(exit) = replica.wait_started(false) {
        return super::ended(&side, None, &replica, exit, 0);
    }
    side.sidecars.write(generation, true)?;
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
    let live = Live::new(Guarded { inlet, replica: replica.clone() }, unit, Stops::default());
    let (exit, machine) = record(&replica, &thread, machine, live);
    super::ended(&side, Some(generation), &replica, exit, machine.position().count)
}

/// The generation that this pair would be.
fn next_generation(side: &Side) -> Result<Generation, Error> {
    let name = &side.plan.name;
    let record = side.store.get(name, STORE_PATIENCE);
    let record = record.map_err(|e| Error::config("store", chain(&e)))?;
    side.sidecars.check_newest(record.as_ref())?;
    let Some(record) = record else { return Ok(Generation::FIRST) };
    if record.phase != Phase::Forgotten {
        let (vm, store) = (name.clone(), side.plan.store.clone());
        return Err(Error::Running { vm, generation: record.generation, store });
    }
    record.generation.next().ok_or_else(|| Error::config("name", "this VM has had all generations there are"))
}

/// Connects to the backup, again and again until the pair is open or this side is out.
fn connect(side: &Side, peer: &str, replica: &Arc<Replica>) -> Result<(), Error> {
    let tls = test_and_set::tls::peer_client(&side.keys).map_err(|e| Error::config("keys", chain(&e)))?;
    let (peer, replica) = (peer.to_owned(), replica.clone());
    let dial = move || {
        let mut told = String::new();
        while replica.is_starting() {
            if !replica.is_connected() {
                match Link::connect(&peer, tls.clone(), PATIENCE) {
                    Ok(link) => replica.connected(link, &[]),
                    Err(e) if e.to_string() != told => {
                        warn!("backup {peer}: {e}; trying again");
                        told = e.to_string();
                    }
                    Err(_) => {}
                }
            }
            std::thread::sleep(RETRY);
        }
    };
    info!("waiting for the backup");
    std::thread::spawn(dial);
    Ok(())
}

/// Runs the guest and records it, until this side is alone or out.
fn record(
    replica: &Arc<Replica>,
    thread: &GuestThread,
    machine: Machine,
    live: Live<Guarded>,
) -> (Exit, Machine) {
    let source = Recorder::new(live, ChannelLog(replica.clone()), Pace::BACKUP);
    let mut guest = GuestLoop { machine, source };
    loop {
        let turn;
        (turn, guest) = thread.with(guest, GuestLoop::run);
        match turn {
            Ok(Turn::Finished(end)) => {
                replica.guest_ended(EndReason::Guest(end));
                return (replica.wait_exit(), guest.machine);
            }
            Ok(_) => {}
            Err(e) => {
                replica.fail(e.into());
                return (replica.wait_exit(), guest.machine);
            }
        }
        let duty = match replica.attend(false) {
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
                return (replica.wait_exit(), guest.machine);
            }
            Duty::Exit(exit) => return (exit, guest.machine),
        }
    }
}

/// Says in the log how the guest stands, so that the backup goes on only from the same, and waits for what comes of it.
fn hand_over(replica: &Arc<Replica>, guest: &mut GuestLoop<Recorder<Guarded, ChannelLog>>) -> Duty {
    let GuestLoop { machine, source } = guest;
    if let Err(e) = source.note_state(machine) {
        replica.fail(e.into());
    }
    log_full_state(machine);
    replica.handle(Event::HandOver);
    replica.attend(false)
}
