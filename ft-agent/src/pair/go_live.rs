//! Going live: the live source goes around the machine that was replayed, and it runs on, alone.

use std::sync::Arc;

use agent::Exit;
use entry::End;
use entry::log::EndReason;
use tracing::info;
use vmm::guest_loop::Turn;
use vmm::inbox::Inbox;
use vmm::source::{Live, Stops};
use vmm::{GuestLoop, Machine};

use super::guest::{Guarded, PairStandby};
use super::guest_thread::GuestThread;
use super::replica::{Duty, Replica};
use super::start::{NET_SLOT, Side};
use crate::error::Error;
use crate::outside::Inlet;
use crate::run::INBOX_CAPACITY;

/// Goes on from where the log has ended. The gate's tail is out already, and the guest's address announced: the verdict did
/// that. `behind_ns` is how far guest time is behind.
///
/// # Errors
/// This host cannot give the guest its devices.
pub fn go_live(
    side: &Side,
    replica: &Arc<Replica>,
    machine: Machine,
    standby: PairStandby,
    behind_ns: u64,
) -> Result<GuestLoop<Live<Guarded>>, Error> {
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
        // What came while another side was live is not for this one.
        tap.drain().map_err(Error::host("tap"))?;
        inlet.attach_tap(NET_SLOT, tap.clone());
    }
    let unit = side.plan.engine_unit();
    replica.runs_on();
    let live = Live::new(Guarded { inlet, replica: replica.clone() }, unit, Stops::default());
    Ok(GuestLoop { machine, source: live })
}

/// Runs a guest that has no backup, to its end.
pub fn run_alone(
    replica: &Arc<Replica>,
    thread: &GuestThread,
    mut guest: GuestLoop<Live<Guarded>>,
) -> (Exit, Machine) {
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
        match replica.attend(true) {
            Duty::Run | Duty::Alone | Duty::HandOver => {}
            Duty::Stop => {
                replica.guest_ended(EndReason::Stopped);
                return (replica.wait_exit(), guest.machine);
            }
            Duty::Exit(exit) => return (exit, guest.machine),
        }
    }
}

/// What a guest's end beyond the log's end comes to: `true`, and its run is over.
///
/// # Errors
/// The machine cannot be reset.
pub fn end_beyond_the_log(machine: &mut Machine, end: Option<End>) -> Result<Option<EndReason>, Error> {
    match end {
        Some(End::Reboot) => {
            machine.reset()?;
            Ok(None)
        }
        end => Ok(end.map(EndReason::Guest)),
    }
}
