//! `--hook COMMAND`: told of each change between PROTECTED and UNPROTECTED.

use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};

use agent::{Phase, Status};
use test_and_set::names::VmName;
use tracing::warn;

use super::status::{phase_name, role_name, word};
use crate::error::Error;

/// The user's command, run for one change after the other on a thread of its own, so that nothing ever waits for it.
pub struct Hook {
    changes: Sender<Status>,
    last: Option<bool>,
}

impl Hook {
    /// For this command, which the shell runs with `VMFT_STATE` (PROTECTED or UNPROTECTED), `VMFT_VM`, `VMFT_ROLE`,
    /// `VMFT_PHASE` and `VMFT_GENERATION` in its environment.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(command: String, vm: VmName) -> Result<Hook, Error> {
        let (changes, wait) = channel();
        let run = move || wait.into_iter().for_each(|status| tell(&command, &vm, &status));
        std::thread::Builder::new().name("hook".into()).spawn(run).map_err(Error::host("thread"))?;
        Ok(Hook { changes, last: None })
    }

    /// What the replica is now. A side that starts, ends or is out is neither.
    pub fn note(&mut self, status: &Status) {
        let protected = match status.phase {
            Phase::Protected => true,
            Phase::Deciding | Phase::Alone => false,
            Phase::Starting | Phase::Ending | Phase::Out => return,
        };
        if self.last.replace(protected) != Some(protected) {
            // The thread ends with this.
            self.changes.send(*status).ok();
        }
    }
}

fn tell(command: &str, vm: &VmName, status: &Status) {
    let generation = status.generation.map_or(String::new(), |g| g.to_string());
    let ended = Command::new("/bin/sh")
        .args(["-c", command])
        .env("VMFT_STATE", word(status.phase == Phase::Protected))
        .env("VMFT_VM", vm.as_str())
        .env("VMFT_ROLE", role_name(status.role))
        .env("VMFT_PHASE", phase_name(status.phase))
        .env("VMFT_GENERATION", generation)
        .stdin(Stdio::null())
        // Standard output is the guest's console.
        .stdout(std::io::stderr())
        .status();
    match ended {
        Ok(status) if status.success() => {}
        Ok(status) => warn!("the hook has failed: {status}"),
        Err(e) => warn!("the hook cannot be run: {e}"),
    }
}
