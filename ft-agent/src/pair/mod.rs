//! The fault-tolerant pair: `vmft primary` and `vmft backup`.
//!
//! ```text
//!   primary.rs                                              backup.rs
//!   guest loop <-> Recorder <-> Live <-> Guarded            guest loop <-> Replayer <-> ChannelRecords, PairStandby
//!        | ChannelLog                                            ^ records         then, from go_live.rs on, Live
//!     Replica (agent, gate, outlet) ══ Link: TLS ══ Replica (agent, gate, outlet)
//!        | store's verdicts                              | store's verdicts
//! ```
//!
//! Who may live is decided by the crate `agent`, a state machine; [`replica`] gives it time, bytes and answers, and does
//! what it asks for. [`guest`] is what stands between the guest's loop and the replica.

mod announce;
mod backup;
mod console;
mod control;
mod errands;
mod forget;
mod go_live;
mod guest;
mod guest_thread;
mod hook;
mod link;
mod metrics;
mod options;
mod primary;
mod quorum;
mod replica;
mod sidecar;
mod spent;
mod start;
mod status;
mod story;

pub use console::Readers;
pub use forget::{ForgetArgs, forget};
pub use options::PairOptions;
pub use status::{At, StatusArgs, console, failover, status, stop};

use agent::Exit;
use entry::End;
use entry::log::EndReason;
use test_and_set::names::Generation;

use crate::error::Error;

/// `vmft primary`.
///
/// # Errors
/// The options, this host, the peer, or the store's verdict.
pub fn primary(options: PairOptions) -> Result<(), Error> {
    start::log_to_stderr();
    primary::run(options.check(agent::Role::Primary)?)
}

/// `vmft backup`.
///
/// # Errors
/// As [`primary`].
pub fn backup(options: PairOptions) -> Result<(), Error> {
    start::log_to_stderr();
    backup::run(options.check(agent::Role::Backup)?)
}

/// What a replica's end is for its disks and its command. A side that ended in order has closed its disks; which copy is
/// the newest is known to the store.
fn ended(
    side: &start::Side,
    generation: Option<Generation>,
    replica: &replica::Replica,
    exit: Exit,
    position: u64,
) -> Result<(), Error> {
    replica.finish();
    if let (Some(generation), Exit::Ended(_) | Exit::HandedOver) = (generation, &exit) {
        side.sidecars.write(generation, false)?;
    }
    match (exit, replica.take_failure()) {
        (Exit::Ended(EndReason::Guest(End::TripleFault)), _) => Err(Error::GuestCrash { position }),
        (Exit::Ended(_) | Exit::HandedOver | Exit::Stopped, _) => Ok(()),
        (Exit::Failed(_), Some(failure)) => Err(failure),
        (exit, _) => Err(Error::Out(exit)),
    }
}
