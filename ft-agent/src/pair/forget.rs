//! `vmft forget`: allows a VM to be started again after all its hosts have died, or on other hosts. For operators.

use std::time::Duration;

use clap::Args;
use test_and_set::blocking::BlockingStore;
use test_and_set::names::VmName;
use test_and_set::record::Applied;
use test_and_set::record::{VmPhase, VmRecord};
use test_and_set::store::{StoreError, chain};

use super::hosts;
use crate::error::Error;
use crate::report::print;

/// How long the store may take to answer.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// The arguments of `vmft forget`.
#[derive(Args, Debug)]
pub struct ForgetArgs {
    /// Name of the VM
    #[arg(long, value_name = "NAME")]
    name: String,
    /// URL of the store, with an operator's keys: raft://HOST:PORT,...?keys=DIR, etcd://... or zookeeper://...
    #[arg(long, value_name = "URL")]
    store: String,
    /// Confirm that this VM runs nowhere: all its hosts are dead, and none is merely cut off or suspended
    #[arg(long)]
    yes: bool,
}

/// Makes the store forget that a VM runs, and on which hosts, so that it can be started again on any. The store
/// keeps the number of its generation and the ids of its newest disk copies.
///
/// # Errors
/// `--yes` is missing, the keys are no operator's, the store does not know the VM, the VM was started again
/// meanwhile, or the store does not answer.
pub fn forget(args: &ForgetArgs) -> Result<(), Error> {
    let name = &args.name;
    let vm: VmName = name.parse().map_err(|e| Error::config("name", format!("{name:?}: {e}")))?;
    let unusable = |e: StoreError| Error::config("store", chain(&e));
    let store = BlockingStore::connect(&args.store).map_err(unusable)?;
    let Some(record) = store.get(&vm, STORE_PATIENCE).map_err(unusable)? else {
        return Err(Error::config("name", format!("the store knows no VM {vm}; check --name and --store")));
    };
    if record.phase == VmPhase::Forgotten && record.hosts.is_empty() {
        return print(&format!("VM {vm} is already forgotten; it can be started\n")).map(drop);
    }
    // A VM that has ended runs nowhere, but is bound to its hosts.
    if record.phase != VmPhase::Forgotten && !args.yes {
        return Err(Error::config("yes", unconfirmed(&vm, &record)));
    }
    match store.forget(&vm, record.generation, STORE_PATIENCE).map_err(unusable)? {
        Applied::Done => print(&format!("VM {vm} is forgotten; it can be started\n")).map(drop),
        Applied::Stale => {
            Err(Error::config("name", format!("VM {vm} was started again just now, so it is not forgotten")))
        }
    }
}

fn unconfirmed(vm: &VmName, record: &VmRecord) -> String {
    let generation = record.generation;
    let hosts = hosts::running(record);
    format!(
        "according to the store generation {generation} of VM {vm} may run {hosts}, and vmft cannot know whether \
         their hosts are dead: a replica that is only cut off or stopped may go on beside the VM that you start \
         next, with the same addresses, and what it writes to its disks is lost. Check both hosts, then give --yes"
    )
}
