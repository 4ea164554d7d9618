//! Confines the process: after its start it needs only a few files and system calls, and the guest's thread almost none.
//!
//! A layer has three parts: a Landlock domain (files, ports to listen on), a seccomp filter (system calls and their arguments),
//! and the capabilities of root, which are given up. The first layer is applied to the main thread before it starts another
//! thread, so that all threads inherit it. The second is added on the guest's thread of a pair before the guest runs: an attacker
//! in control of that thread can neither open a file, nor connect to a host, nor start a thread. A layer cannot be removed, nor
//! be escaped by executing a program: `execve` is not allowed. No memory becomes executable; what the software CPU's translator
//! needs is mapped before ([`vmm::Engine::reserve`]).
//!
//! A refused call fails with EPERM, and the program goes on. Both sides of a pair make the same calls, so that a call which
//! a new libc makes and which is missing in the list must not end both sides.

mod calls;
mod capabilities;

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, NetPort, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::thread::CapabilitySet;
use tracing::{info, warn};

/// The Landlock rights that are restricted; a kernel that knows fewer rights restricts those.
const RIGHTS: ABI = ABI::V6;
/// Files for looking up host names, and the libraries that do it.
const RESOLVER: [&str; 5] = ["/etc", "/lib", "/lib64", "/usr/lib", "/run/systemd/resolve"];
/// What every process reads: random numbers for the guest.
const RANDOM: &str = "/dev/urandom";
/// The first port that every user may listen on.
const PORT_OF_ALL: u16 = 1024;

/// What the process still has to open after it is confined.
#[derive(Debug, Default)]
pub struct Needs {
    /// Files and directories that are read.
    pub read: Vec<PathBuf>,
    /// Devices that are opened, read, written and used with ioctls.
    pub devices: Vec<PathBuf>,
    /// Directories in which files are created, replaced and removed.
    pub make_in: Vec<PathBuf>,
    /// Directories in which files are removed.
    pub remove_in: Vec<PathBuf>,
    /// Names of hosts are looked up, and connected to.
    pub resolves: bool,
    /// TCP ports that are connected to, if no names are looked up.
    pub connect: Vec<u16>,
    /// TCP ports that are listened on.
    pub listen: Vec<u16>,
    /// The guest runs on KVM.
    pub kvm: bool,
}

/// The directory that a file is in.
pub fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir.to_owned(),
        _ => PathBuf::from("."),
    }
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

/// What of a layer was applied.
struct AppliedLayer {
    files: Result<RestrictionStatus, RulesetError>,
    capabilities: std::io::Result<CapabilitySet>,
    calls: Result<usize, ConfineError>,
}

/// Confines a pair's process: the calling thread and all threads that it starts later. Logs what was applied, and what this
/// kernel lacks.
pub fn process(needs: &Needs) -> GuestConfinement {
    let applied = AppliedLayer {
        files: restrict_process(needs),
        capabilities: capabilities::keep(needs.capabilities()),
        calls: calls::process(needs.kvm),
    };
    applied.log("process");
    GuestConfinement { kvm: needs.kvm }
}

/// Confines the process that keeps a replica's keys, as [`process`] does.
pub fn keeper(needs: &Needs) {
    let applied = AppliedLayer {
        files: restrict_process(needs),
        capabilities: capabilities::keep(needs.capabilities()),
        calls: calls::keeper(),
    };
    applied.log("keeper");
}

/// Confines a process that runs or replays a guest without a pair, as [`process`] does.
pub fn lone_process(needs: &Needs) {
    let applied = AppliedLayer {
        files: restrict_process(needs),
        capabilities: capabilities::keep(needs.capabilities()),
        calls: calls::lone(needs.kvm),
    };
    applied.log_shortcomings("process");
}

impl GuestConfinement {
    /// Confines the calling thread, which from now on only runs the guest.
    pub fn confine(self) {
        let needs = Needs { kvm: self.kvm, ..Needs::default() };
        let applied = AppliedLayer {
            files: restrict_guest(),
            capabilities: capabilities::keep(needs.capabilities()),
            calls: calls::guest(self.kvm),
        };
        applied.log("guest's thread");
    }
}

impl Needs {
    /// The capabilities that are not given up.
    fn capabilities(&self) -> CapabilitySet {
        let mut kept = CapabilitySet::empty();
        // Keys and sidecars may belong to another user than root.
        kept.set(CapabilitySet::DAC_OVERRIDE, !self.read.is_empty() || !self.make_in.is_empty());
        kept.set(CapabilitySet::NET_BIND_SERVICE, self.listen.iter().any(|port| *port < PORT_OF_ALL));
        // Counters of the guest's instructions.
        kept.set(CapabilitySet::PERFMON, self.kvm);
        kept
    }
}

impl AppliedLayer {
    /// Logs what was applied, and what was not.
    fn log(self, who: &str) {
        if let Ok(RestrictionStatus { ruleset: RulesetStatus::FullyEnforced, .. }) = self.files {
            info!("{who} confined by landlock");
        }
        if let Ok(calls) = &self.calls {
            info!("{who} confined by seccomp to {calls} system calls");
        }
        self.log_shortcomings(who);
    }

    /// Logs what was not applied.
    fn log_shortcomings(self, who: &str) {
        match self.files {
            Ok(RestrictionStatus { ruleset: RulesetStatus::FullyEnforced, .. }) => {}
            Ok(RestrictionStatus { ruleset: RulesetStatus::PartiallyEnforced, landlock, .. }) => {
                warn!(
                    "{who} only partly confined by landlock: this kernel supports {landlock:?}, not all of {RIGHTS:?}"
                );
            }
            Ok(status) => {
                warn!("{who} not confined by landlock: this kernel's support is {:?}", status.landlock);
            }
            Err(e) => warn!("{who} not confined by landlock: {e}"),
        }
        if let Err(e) = self.capabilities {
            warn!("{who} keeps its capabilities: {e}");
        }
        if let Err(e) = self.calls {
            warn!("{who} not confined by seccomp: {e}");
        }
    }
}

fn restrict_process(needs: &Needs) -> Result<RestrictionStatus, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let resolver: &[&str] = if needs.resolves { &RESOLVER } else { &[] };
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let make = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile;
    // The store names members that are not in its URL, on any port.
    let network = if needs.resolves { AccessNet::BindTcp.into() } else { AccessNet::from_all(RIGHTS) };
    let port = |port: &u16, access| Ok::<_, RulesetError>(NetPort::new(*port, access));
    let listened = needs.listen.iter().map(|number| port(number, AccessNet::BindTcp));
    let connected = needs.connect.iter().map(|number| port(number, AccessNet::ConnectTcp));
    Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))?
        .handle_access(network)?
        .scope(Scope::from_all(RIGHTS))?
        .create()?
        .add_rules(path_beneath_rules([RANDOM], AccessFs::ReadFile))?
        .add_rules(path_beneath_rules(resolver, read))?
        .add_rules(path_beneath_rules(&needs.read, read))?
        .add_rules(path_beneath_rules(&needs.devices, device))?
        .add_rules(path_beneath_rules(&needs.make_in, make))?
        .add_rules(path_beneath_rules(&needs.remove_in, BitFlags::from(AccessFs::RemoveFile)))?
        .add_rules(listened)?
        .add_rules(connected)?
        .restrict_self()
}

fn restrict_guest() -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))?
        .handle_access(AccessNet::from_all(RIGHTS))?
        .create()?
        .restrict_self()
}
