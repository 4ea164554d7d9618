//! The fault-tolerant pair: `vmft primary` and `vmft backup`.
//!
//! ```text
//!   primary.rs                                          backup.rs
//!   guest loop <-> Recorder <-> Live <-> GatedOutside   guest loop <-> Replayer <-> BackupStandby
//!        | ChannelLog                                        ^ ChannelRecords
//!     Replica (agent, gate, outlet) ════ PeerLink: TLS ════ Replica (agent, gate, outlet)
//!        | the store's verdicts                              | the store's verdicts
//! ```
//!
//! A backup that goes live (`go_live.rs`) gets a source like the primary's: `Live` around a `GatedOutside`.
//!
//! The crate `agent`, a state machine, decides which side may live. [`replica`] passes time, bytes and the
//! store's answers to it, and carries out its actions. [`guest_io`] connects the guest loop with the replica.

mod acceptor;
mod admission;
mod announce;
mod backup;
mod console;
mod control;
mod forget;
mod go_live;
mod guest_io;
mod guest_thread;
mod history;
mod hook;
mod hook_runner;
mod hosts;
mod keeper;
mod link;
mod link_keys;
mod metrics;
mod operated;
mod operator;
mod options;
mod primary;
mod quorum;
mod replica;
mod report;
mod side;
mod sidecar;
mod signals;
mod status;
mod time_accounting;
mod worker;

pub use forget::{ForgetArgs, forget};
pub use hook_runner::{HookRunnerArgs, run as hook_runner};
pub use keeper::KeeperArgs;
pub use operator::{ControlArgs, StopArgs, console, failover, stop};
pub use options::PairOptions;
pub use status::{StatusArgs, status};

use crate::error::Error;

/// `vmft primary`.
///
/// # Errors
/// The options are wrong, this host fails, the guest crashes, or this side does not get to run the VM.
pub fn primary(options: PairOptions) -> Result<(), Error> {
    let role = agent::Role::Primary;
    let options = options.with_file(role)?;
    options.start_log("primary");
    primary::run(options.check(role)?)
}

/// `vmft backup`.
///
/// # Errors
/// The same as for [`primary()`], or the replay differs from the recording.
pub fn backup(options: PairOptions) -> Result<(), Error> {
    let role = agent::Role::Backup;
    let options = options.with_file(role)?;
    options.start_log("backup");
    backup::run(options.check(role)?)
}

/// `vmft keeper`, which a replica starts for itself.
///
/// # Errors
/// Somebody else has started it.
pub fn keeper(args: &KeeperArgs) -> Result<(), Error> {
    keeper::run(args)
}
