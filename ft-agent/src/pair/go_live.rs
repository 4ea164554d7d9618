//! Going live: the machine that was replayed gets the live source, and runs on alone.

use std::sync::Arc;

use agent::Outcome;
use entry::End;
use entry::log::EndReason;
use tracing::info;
use vmm::guest_loop::Turn;
use vmm::inbox::Inbox;
use vmm::source::{Live, PlannedStops};
use vmm::{GuestLoop, Machine};

use super::guest_io::{BackupStandby, GatedOutside};
use super::guest_thread::GuestThread;
use super::replica::{Duty, Replica};
use super::side::{NET_SLOT, PairSide};
use crate::error::Error;
use crate::failpoint;
use crate::outside::{INBOX_CAPACITY, Inlet};

/// Gives the machine its devices on this host, so that it can go on where the log has ended. When the verdict
/// came, the outputs left in the gate were sent and the guest's address was announced. `behind_ns` is how far
/// guest time lags behind that of the primary.
///
/// # Errors
/// A device cannot be started on this host.
pub fn go_live(
    side: &PairSide,
    replica: &Arc<Replica>,
    machine: Machine,
    standby: BackupStandby,
    behind_ns: u64,
) -> Result<GuestLoop<Live<GatedOutside>>, Error> {
    failpoint::delay("going-live");
    let inbox = Inbox::new(machine.kicker(), INBOX_CAPACITY);
    replica.set_guest(inbox.1.clone());
    let mut inlet = Inlet::new(inbox, side.plan.clock(), machine.time_ns(), behind_ns)?;
    side.watch_for_starvation(&mut inlet);
    for (slot, image) in standby.into_images() {
        inlet.attach_disk(slot, image);
    }
    let requests = machine.unfinished_disk_requests();
    info!(position = machine.position().count, behind_ns, requests = requests.len(), "going live");
    for request in requests {
        inlet.disk(request)?;
    }
    if let Some(tap) = &side.tap {
        // Frames that arrived while the primary was live have been taken by the primary.
        tap.drain().map_err(Error::host("cannot discard old frames of the tap"))?;
        inlet.attach_tap(NET_SLOT, tap.clone());
    }
    let unit = side.plan.engine_unit();
    replica.guest_runs_on();
    let live = Live::new(GatedOutside { inlet, replica: replica.clone() }, unit, PlannedStops::default());
    Ok(GuestLoop { machine, source: live })
}

/// Runs a guest without a backup until it ends. Returns how this side ended, and the machine.
pub fn run_alone(
    replica: &Arc<Replica>,
    thread: &GuestThread,
    mut guest: GuestLoop<Live<GatedOutside>>,
) -> (Outcome, Machine) {
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
        match replica.next_duty(true) {
            Duty::Run | Duty::Alone | Duty::HandOver => {}
            Duty::Stop => {
                replica.guest_ended(EndReason::Stopped);
                return (replica.wait_outcome(), guest.machine);
            }
            Duty::Leave(outcome) => return (outcome, guest.machine),
        }
    }
}

/// Handles an end of the guest that came after the last record of the log. A reboot resets the machine, which
/// then goes on: `None`. Any other end ends the run, for the reason returned.
///
/// # Errors
/// The machine cannot be reset.
pub fn end_after_the_log(machine: &mut Machine, end: Option<End>) -> Result<Option<EndReason>, Error> {
    match end {
        Some(End::Reboot) => {
            machine.reset()?;
            Ok(None)
        }
        end => Ok(end.map(EndReason::Guest)),
    }
}
