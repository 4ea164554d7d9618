//! `vmft forget`: lets a VM start again whose hosts have all died.

use std::time::Duration;

use clap::Args;
use test_and_set::blocking::Blocking;
use test_and_set::names::VmName;
use test_and_set::record::{Phase, Record};
use test_and_set::store::{Outcome, StoreError, chain};

use crate::error::Error;

/// How long the store may take to answer.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// What `vmft forget` takes.
#[derive(Args, Debug)]
pub struct ForgetArgs {
    /// Name of the VM
    #[arg(long, value_name = "NAME")]
    name: String,
    /// The store: raft://HOST:PORT,...?keys=DIR, etcd:// or zookeeper://
    #[arg(long, value_name = "URL")]
    store: String,
    /// No host runs this VM any more, and none that could is only cut off or stopped
    #[arg(long)]
    yes: bool,
}

/// Makes the store forget a VM, which may then be started anew. Its generation's number and the names of its newest disks
/// stay known.
///
/// # Errors
/// `--yes` is missing, the VM is unknown or has moved on, or the store does not answer.
pub fn forget(args: &ForgetArgs) -> Result<(), Error> {
    let name = &args.name;
    let vm: VmName = name.parse().map_err(|e| Error::config("name", format!("{name:?}: {e}")))?;
    let unusable = |e: StoreError| Error::config("store", chain(&e));
    let store = Blocking::connect(&args.store).map_err(unusable)?;
    let Some(record) = store.get(&vm, STORE_PATIENCE).map_err(unusable)? else {
        return Err(Error::config("name", format!("the store knows no VM {vm}")));
    };
    if record.phase == Phase::Forgotten {
        println!("VM {vm} is forgotten already: it can be started");
        return Ok(());
    }
    if !args.yes {
        return Err(Error::config("yes", unconfirmed(&vm, &record)));
    }
    match store.forget(&vm, record.generation, STORE_PATIENCE).map_err(unusable)? {
        Outcome::Done => println!("VM {vm} is forgotten: it can be started"),
        Outcome::Stale => return Err(Error::config("name", format!("VM {vm} was started anew just now"))),
    }
    Ok(())
}

fn unconfirmed(vm: &VmName, record: &Record) -> String {
    let generation = record.generation;
    let who = match &record.phase {
        Phase::Open { holder: Some(holder), .. } => format!("{holder} alone"),
        Phase::Open { members, .. } => match &members.backup {
            Some(backup) => format!("{} and {}", members.primary.incarnation, backup.incarnation),
            None => format!("{}", members.primary.incarnation),
        },
        Phase::Forgotten => "nobody".into(),
    };
    format!(
        "by the store's record {who} may run generation {generation} of VM {vm}. Nobody but you can know whether they are \
         dead: one that is only cut off or stopped may go on beside the VM that you start next, with the same addresses, \
         and what it has written to its disks is lost. Look at its hosts, then give --yes"
    )
}
