//! `--hook COMMAND`: told of each change between PROTECTED and UNPROTECTED.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use agent::{Phase, Status};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use test_and_set::names::VmName;
use tracing::warn;

use super::status::{phase_name, role_name, word};
use crate::error::Error;

/// Reads a line for each change and runs the user's command for it, one after the other. It ends with the replica, which
/// itself may start no program.
const RUNNER: &str = r#"
while read -r VMFT_STATE VMFT_VM VMFT_ROLE VMFT_PHASE VMFT_GENERATION; do
    export VMFT_STATE VMFT_VM VMFT_ROLE VMFT_PHASE VMFT_GENERATION
    /bin/sh -c "$0" </dev/null || echo "vmft: the hook has failed: exit code $?" >&2
done
"#;

/// The user's command, run by a process of its own, so that nothing ever waits for it.
#[derive(Clone)]
pub struct Hook {
    changes: Arc<File>,
    vm: VmName,
    last: Option<bool>,
}

impl Hook {
    /// For this command, which the shell runs with `VMFT_STATE` (PROTECTED or UNPROTECTED), `VMFT_VM`, `VMFT_ROLE`,
    /// `VMFT_PHASE` and `VMFT_GENERATION` in its environment.
    ///
    /// # Errors
    /// There is no process to be had.
    pub fn start(command: &str, vm: VmName) -> Result<Hook, Error> {
        let start = || {
            let runner = Command::new("/bin/sh")
                .args(["-c", RUNNER, command])
                .stdin(Stdio::piped())
                // Standard output is the guest's console.
                .stdout(std::io::stderr())
                // What a terminal sends to the replica is not for it.
                .process_group(0)
                .spawn()?;
            let changes: OwnedFd =
                runner.stdin.map(Into::into).unwrap_or_else(|| unreachable!("it is piped"));
            fcntl(&changes, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok(changes.into())
        };
        let changes: File = start().map_err(Error::host("hook"))?;
        Ok(Hook { changes: changes.into(), vm, last: None })
    }

    /// What the replica is now. A side that starts, ends or is out is neither.
    pub fn note(&mut self, status: &Status) {
        let protected = match status.phase {
            Phase::Protected => true,
            Phase::Deciding | Phase::Alone => false,
            Phase::Starting | Phase::Ending | Phase::Out => return,
        };
        if self.last.replace(protected) == Some(protected) {
            return;
        }
        let generation = status.generation.map_or(String::new(), |g| g.to_string());
        let (vm, role, phase) = (self.vm.as_str(), role_name(status.role), phase_name(status.phase));
        // A line is written whole or not at all.
        let line = format!("{} {vm} {role} {phase} {generation}\n", word(protected));
        if let Err(e) = (&*self.changes).write_all(line.as_bytes()) {
            warn!("the hook is not told: {e}");
        }
    }
}
