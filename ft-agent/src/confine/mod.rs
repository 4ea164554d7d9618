//! Confines the process: after its start it needs only a few files and system calls, and the guest's thread almost none.
//!
//! There are two layers, each made of a Landlock domain (files, ports to listen on) and a seccomp filter (system calls). The
//! first layer is applied to the main thread before it starts another thread, so that all threads inherit it. The second is
//! added on the guest's thread before the guest runs: an attacker in control of that thread can neither open a file, nor
//! connect to a host, nor start a thread. A layer cannot be removed, nor be escaped by executing a program: `execve` is
//! not allowed.
//!
//! A refused call fails with EPERM, and the program goes on. Both sides of a pair make the same calls, so that a call which
//! a new libc makes and which is missing in the list must not end both sides.

mod calls;

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use tracing::{info, warn};

/// The Landlock rights that are restricted; a kernel that knows fewer rights restricts those.
const RIGHTS: ABI = ABI::V6;
/// Files for looking up host names, and the libraries that do it.
const RESOLVER: [&str; 5] = ["/etc", "/lib", "/lib64", "/usr/lib", "/run/systemd/resolve"];

/// What the process still has to open after it is confined.
#[derive(Debug, Default)]
pub struct Needs {
    /// Files and directories that are read.
    pub read: Vec<PathBuf>,
    /// Devices that are opened, read, written and used with ioctls.
    pub devices: Vec<PathBuf>,
    /// Directories in which files are created, replaced and removed.
    pub make_in: Vec<PathBuf>,
    /// TCP ports that are listened on.
    pub listen: Vec<u16>,
    /// The guest runs on KVM.
    pub kvm: bool,
}

/// The second layer, for the guest's thread.
#[derive(Clone, Copy, Debug)]
pub struct GuestConfinement {
    kvm: bool,
}

/// Why a layer could not be applied.
#[derive(Debug, thiserror::Error)]
enum ConfineError {
    #[error(transparent)]
    Landlock(#[from] RulesetError),
    #[error(transparent)]
    Seccomp(#[from] seccompiler::Error),
}

/// Confines the calling thread and all threads that it starts later. Logs what was applied, and what this kernel lacks.
pub fn process(needs: &Needs) -> GuestConfinement {
    log_result("process", restrict_process(needs).map_err(Into::into), calls::process(needs.kvm));
    GuestConfinement { kvm: needs.kvm }
}

impl GuestConfinement {
    /// Confines the calling thread, which from now on only runs the guest.
    pub fn confine(self) {
        log_result("guest's thread", restrict_guest().map_err(Into::into), calls::guest(self.kvm));
    }
}

fn log_result(who: &str, files: Result<RestrictionStatus, ConfineError>, calls: Result<usize, ConfineError>) {
    match files {
        Ok(RestrictionStatus { ruleset: RulesetStatus::FullyEnforced, .. }) => {
            info!("{who} confined by landlock")
        }
        Ok(RestrictionStatus { ruleset: RulesetStatus::PartiallyEnforced, landlock, .. }) => {
            warn!(
                "{who} only partly confined by landlock: this kernel supports {landlock:?}, not all of {RIGHTS:?}"
            );
        }
        Ok(status) => warn!("{who} not confined by landlock: this kernel's support is {:?}", status.landlock),
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
        // Connecting is not restricted, because the store names members that are not in its URL.
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
