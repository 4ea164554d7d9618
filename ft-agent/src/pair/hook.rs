//! `--hook COMMAND`: runs a command of the user for each change between PROTECTED, AT RISK and
//! UNPROTECTED.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use agent::{Phase, Status};
use clap::ValueEnum;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use test_and_set::names::VmName;
use tracing::warn;

use super::options::PairPlan;
use super::report::{phase_name, protection_word, role_name};
use crate::error::Error;

/// The user's command. A separate process runs it, so that the replica never waits for it.
#[derive(Clone)]
pub struct Hook {
    changes: Arc<File>,
    vm: VmName,
    last: Option<String>,
}

impl Hook {
    /// Starts the process that runs `command`. The shell runs it with `VMFT_STATE` (PROTECTED, AT_RISK or
    /// UNPROTECTED), `VMFT_VM`, `VMFT_ROLE`, `VMFT_PHASE`, `VMFT_GENERATION` and `VMFT_REASON` in its environment.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(command: &str, plan: &PairPlan) -> Result<Hook, Error> {
        let start = || {
            let format =
                plan.log_format.to_possible_value().unwrap_or_else(|| unreachable!("none is hidden"));
            let runner = Command::new(std::env::current_exe()?)
                .args(["hook-runner", "--name", plan.name.as_str(), "--log-format", format.get_name()])
                .args(["--seconds", &plan.hook_seconds.to_string(), "--", command])
                .stdin(Stdio::piped())
                // Standard output is the guest's console.
                .stdout(std::io::stderr())
                // A terminal's signals to the replica, such as that of Ctrl-C, are not for the command.
                .process_group(0)
                .spawn()?;
            let changes: OwnedFd =
                runner.stdin.map(Into::into).unwrap_or_else(|| unreachable!("it is piped"));
            fcntl(&changes, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok(changes.into())
        };
        let changes: File = start().map_err(Error::host("cannot start the process for --hook"))?;
        Ok(Hook { changes: changes.into(), vm: plan.name.clone(), last: None })
    }

    /// Reports the replica's status, and runs the command if it has changed. A side that is starting, ending
    /// or out is neither PROTECTED, AT RISK nor UNPROTECTED.
    pub fn update(&mut self, status: &Status) {
        if matches!(status.phase, Phase::Starting | Phase::Ending | Phase::Out) {
            return;
        }
        // The fields of a line are separated by spaces.
        let state = protection_word(&status.protection).replace(' ', "_");
        if self.last.replace(state.clone()).is_some_and(|last| last == state) {
            return;
        }
        let generation = status.generation.map_or(String::new(), |g| g.to_string());
        let (vm, role, phase) = (self.vm.as_str(), role_name(status.role), phase_name(status.phase));
        // A line this short is written to the pipe whole or not at all.
        let reason = status.protection.reason().unwrap_or_default();
        let line = format!("{state} {vm} {role} {phase} {generation} {reason}\n");
        if let Err(e) = (&*self.changes).write_all(line.as_bytes()) {
            warn!("the command of --hook is not run for this change to {state}: {e}");
        }
    }
}
