//! `vmft backup`: replays what its primary records, and goes live when the primary is lost.

use std::convert::Infallible;
use std::sync::Arc;

use agent::{Event, Outcome, Role};
use entry::End;
use test_and_set::names::Generation;
use tracing::{info, warn};
use vmm::guest_loop::{LoopError, Turn};
use vmm::replay::{ReplayError, Replayer};
use vmm::{GuestLoop, Machine, Slot};

use super::acceptor::PeerAcceptor;
use super::go_live::{end_after_the_log, go_live, run_alone};
use super::guest_io::{BackupStandby, ChannelRecords, log_full_state};
use super::guest_thread::GuestThread;
use super::operated::Operated;
use super::options::PairPlan;
use super::replica::Replica;
use super::side::PairSide;
use super::signals::Signals;
use crate::error::Error;
use crate::failpoint;
use crate::guest::Guest;
use crate::outside::disk::Image;

/// Runs a backup until the VM or this side ends.
///
/// # Errors
/// The same as for [`super::backup()`].
pub fn run(plan: PairPlan) -> Result<(), Error> {
    let signals = Signals::catch()?;
    let (mut guest, images) = Guest::new(&plan.machine, plan.clock())?;
    // Reads the disks now, so that the primary does not have to wait for it.
    guest.identity()?;
    let side = PairSide::open(Role::Backup, plan)?;
    let (acceptor, peers) = PeerAcceptor::start(&side)?;
    let operated = {
        let (finding, stopping) = (acceptor.clone(), acceptor.clone());
        Operated::new(&side.plan, move || finding.replica(), move || stopping.stop())
    };
    side.start_control(&operated)?;
    signals.obey(operated)?;
    let (replica, generation) = loop {
        let Ok(peer) = peers.recv() else { return Ok(()) };
        guest.adopt(&peer.hello.identity);
        // The generation that the primary sends will replace this one.
        let replica = match side.new_replica(Role::Backup, guest.identity()?, Generation::FIRST) {
            Ok(replica) => replica,
            Err(e) => {
                // Without a thread or a file now, there may be one when the primary calls again.
                warn!("cannot take in the primary: {e}");
                peer.link.close();
                continue;
            }
        };
        acceptor.set_replica(Some(replica.clone()));
        replica.handle(Event::Ready);
        replica.connected(peer.link, &peer.bytes);
        match replica.wait_started(true) {
            Ok(Some(generation)) => break (replica, generation),
            Ok(None) => {
                acceptor.set_replica(None);
                replica.leave(Outcome::Stopped);
                // Its threads end, and so do those of its connection.
                replica.guest_thread_done();
            }
            Err(outcome) => return side.conclude(None, &replica, outcome, 0),
        }
    };
    let slots = guest.config.slots.iter().enumerate();
    let slots = slots.filter(|(_, s)| matches!(s, Slot::Disk { .. })).map(|(n, _)| n as u8);
    side.mark_disks(generation, true)?;
    side.watch_tap(&replica)?;
    let images = slots.zip(images).collect();
    let (machine, thread) = side.boot(guest)?;
    let (outcome, position) = replay_then_go_live(&side, &replica, thread, machine, images);
    side.conclude(Some(generation), &replica, outcome, position)
}

/// Replays until the log ends, and goes live if the store decides that this side lives. Returns how this side
/// ended, and the position of its guest.
fn replay_then_go_live(
    side: &PairSide,
    replica: &Arc<Replica>,
    thread: GuestThread,
    machine: Machine,
    images: Vec<(u8, Image)>,
) -> (Outcome, u64) {
    let standby = BackupStandby::new(replica.clone(), images.into_iter());
    let source = Replayer::new(ChannelRecords::new(replica.clone()), standby);
    let (end, guest) = thread.run_with(GuestLoop { machine, source }, replay);
    let at = guest.machine.position().count;
    let end = match end {
        Ok(end) => end,
        Err(e) => {
            replica.fail(replay_failure(e));
            return (replica.wait_outcome(), at);
        }
    };
    info!(position = at, "replayed to the end of the log");
    if let Err(outcome) = replica.wait_verdict() {
        return (outcome, at);
    }
    let (outcome, machine) = live(side, replica, thread, guest, end);
    (outcome, machine.map_or(at, |m| m.position().count))
}

type PairReplay = GuestLoop<Replayer<ChannelRecords, BackupStandby>>;

/// Replays until the log or the guest's run ends. `None`: the log ended.
fn replay(guest: &mut PairReplay) -> Result<Option<End>, LoopError<ReplayError<Infallible, Error>>> {
    let mut missed = 0;
    loop {
        failpoint::flip_ram_bit(&mut guest.machine);
        match guest.run_once()? {
            Turn::Again => {
                let retries = guest.machine.counts().landings.retries;
                if std::mem::replace(&mut missed, retries) < retries {
                    warn!(
                        retries,
                        "the counter went past a position; seeking it again with twice the margin"
                    );
                }
            }
            Turn::Paused => return Ok(None),
            Turn::Finished(end) => return Ok(Some(end)),
        }
    }
}

/// Goes live at the end of the log, or ends this side if the guest's run has ended (`end`).
fn live(
    side: &PairSide,
    replica: &Arc<Replica>,
    thread: GuestThread,
    guest: PairReplay,
    end: Option<End>,
) -> (Outcome, Option<Machine>) {
    let GuestLoop { mut machine, source } = guest;
    match end_after_the_log(&mut machine, end) {
        Ok(None) => {}
        Ok(Some(reason)) => {
            replica.guest_ended(reason);
            return (replica.wait_outcome(), Some(machine));
        }
        Err(e) => {
            replica.fail(e);
            return (replica.wait_outcome(), None);
        }
    }
    let behind_ns = source.records().behind_ns(machine.time_ns());
    log_full_state(&mut machine);
    match go_live(side, replica, machine, source.into_standby(), behind_ns) {
        Ok(guest) => {
            let (outcome, machine) = run_alone(replica, &thread, guest);
            (outcome, Some(machine))
        }
        Err(e) => {
            replica.fail(e);
            (replica.wait_outcome(), None)
        }
    }
}

fn replay_failure<L: std::error::Error>(e: LoopError<ReplayError<L, Error>>) -> Error {
    match e {
        LoopError::Machine(e) => e.into(),
        LoopError::Source(ReplayError::Standby(e)) => e,
        LoopError::Source(ReplayError::Divergence(d)) => Error::Divergence(d),
        LoopError::Source(ReplayError::Log(e)) => Error::Host {
            what: "cannot read the log from the channel".into(),
            source: std::io::Error::other(e.to_string()),
        },
    }
}
