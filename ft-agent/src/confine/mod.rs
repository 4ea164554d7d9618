//! What the process may not do: after its start it needs a few files and system calls, and the guest's thread next to none.
//!
//! Two layers, each of a Landlock domain (files, ports to listen on) and a seccomp filter (system calls). The first is put on
//! the main thread before there is another, so that all inherit it; the second is added on the guest's thread before the
//! guest runs: whatever gets hold of that can open no file, connect to nobody and start no thread. Neither can be
//! taken off again, nor be passed by executing a program: there is no `execve`.
//!
//! A call that is refused fails with EPERM, and the program goes on: both sides of a pair make the same calls, and one that a
//! new libc makes and this list has not must not end both.

mod calls;

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use tracing::{info, warn};

/// The Landlock rights that are asked for; a kernel that knows fewer enforces what it knows.
const RIGHTS: ABI = ABI::V6;
/// Where names of hosts are looked up, and the libraries for that.
const RESOLVER: [&str; 5] = ["/etc", "/lib", "/lib64", "/usr/lib", "/run/systemd/resolve"];

/// What the process still needs when it has opened what it can.
#[derive(Debug, Default)]
pub struct Needs {
    /// Files and directories that are read.
    pub read: Vec<PathBuf>,
    /// Devices that are opened, read, written and asked for things.
    pub devices: Vec<PathBuf>,
    /// Directories in which files are made, replaced and removed.
    pub make_in: Vec<PathBuf>,
    /// TCP ports that are listened on.
    pub listen: Vec<u16>,
    /// The guest runs on KVM.
    pub kvm: bool,
}

/// What the guest's thread will be confined to.
#[derive(Clone, Copy, Debug)]
pub struct GuestThread {
    kvm: bool,
}

/// A layer that a kernel does not put on.
#[derive(Debug, thiserror::Error)]
enum ConfineError {
    #[error(transparent)]
    Landlock(#[from] RulesetError),
    #[error(transparent)]
    Seccomp(#[from] seccompiler::Error),
}

/// Confines the calling thread and all that it will start. Says what was applied, and what this kernel lacks.
pub fn process(needs: &Needs) -> GuestThread {
    tell("process", restrict_process(needs).map_err(Into::into), calls::process(needs.kvm));
    GuestThread { kvm: needs.kvm }
}

impl GuestThread {
    /// Confines the calling thread, which has nothing to do but to run the guest.
    pub fn confine(self) {
        tell("guest's thread", restrict_guest().map_err(Into::into), calls::guest(self.kvm));
    }
}

fn tell(who: &str, files: Result<RestrictionStatus, ConfineError>, calls: Result<usize, ConfineError>) {
    match files {
        Ok(RestrictionStatus { ruleset: RulesetStatus::FullyEnforced, .. }) => {
            info!("{who} confined by landlock")
        }
        Ok(RestrictionStatus { ruleset: RulesetStatus::PartiallyEnforced, landlock, .. }) => {
            warn!("{who} confined in part by landlock: this kernel has {landlock:?}, wanted was {RIGHTS:?}");
        }
        Ok(status) => warn!("{who} not confined by landlock: this kernel has {:?}", status.landlock),
        Err(e) => warn!("{who} not confined by landlock: {e}"),
    }
    match calls {
        Ok(calls) => info!("{who} confined by seccomp to {calls} system calls"),
        Err(e) => warn!("{who} not confined by seccomp: {e}"),
    }
}

fn restrict_process(needs: &Needs) -> Result<RestrictionStatus, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let make = read
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::RemoveFile;
    let ports =
        needs.listen.iter().map(|port| Ok::<_, RulesetError>(NetPort::new(*port, AccessNet::BindTcp)));
    Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))?
        // To connect is free: the store names members that its URL does not.
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(RIGHTS))?
        .create()?
        .add_rules(path_beneath_rules(RESOLVER.map(Path::new), read))?
        .add_rules(path_beneath_rules(&needs.read, read))?
        .add_rules(path_beneath_rules(&needs.devices, device))?
        .add_rules(path_beneath_rules(&needs.make_in, make))?
        .add_rules(ports)?
        .restrict_self()
}

fn restrict_guest() -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))?
        .handle_access(AccessNet::from_all(RIGHTS))?
        .create()?
        .restrict_self()
}
