//! The process that runs the command of `--hook`: `vmft` itself, started before the replica is confined and may start no
//! programs. It reads a line for each change from its standard input, and ends with it.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use clap::Args;
use host_log::LogFormat;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tracing::warn;

use crate::error::Error;

/// How many changes may wait while the command runs for an earlier one; the oldest are left out.
const CHANGES_MAX: usize = 64;
/// Time between two looks whether the command has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How long a command that was killed may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(1);
/// The names of a line's fields; the last one takes the rest of the line.
const VARIABLES: [&str; 6] =
    ["VMFT_STATE", "VMFT_VM", "VMFT_ROLE", "VMFT_PHASE", "VMFT_GENERATION", "VMFT_REASON"];

/// What the runner is started with.
#[derive(Args, Debug)]
pub struct HookRunnerArgs {
    /// Name of the VM
    #[arg(long)]
    pub name: String,
    /// Time after which the command is killed
    #[arg(long)]
    pub seconds: u64,
    /// What each line of the log is
    #[arg(long)]
    pub log_format: LogFormat,
    /// The command
    pub command: String,
}

/// Runs the command for one change after the other, until there are no more.
///
/// # Errors
/// A thread cannot be started.
pub fn run(args: HookRunnerArgs) -> Result<(), Error> {
    host_log::serve(args.log_format, vec![("vm", args.name.clone()), ("role", "hook".into())]);
    let failed = || Error::host("cannot start a thread of the hook");
    host_log::write_on_thread().map_err(failed())?;
    let changes = read_changes().map_err(failed())?;
    let (mut waiting, limit) = (VecDeque::new(), Duration::from_secs(args.seconds));
    while let Some(change) = waiting.pop_front().or_else(|| changes.recv().ok()) {
        run_for(&args.command, &change, limit);
        waiting.extend(changes.try_iter());
        let excess = waiting.len().saturating_sub(CHANGES_MAX);
        if excess > 0 {
            warn!("the command of --hook is not run for {excess} older changes: there are newer ones");
            drop(waiting.drain(..excess));
        }
    }
    Ok(())
}

/// Reads changes at once, so that the replica can always write the next.
fn read_changes() -> io::Result<Receiver<String>> {
    let (sender, changes) = channel();
    let read = move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("changes".into()).spawn(read)?;
    Ok(changes)
}

fn run_for(command: &str, change: &str, limit: Duration) {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).envs(VARIABLES.into_iter().zip(change.splitn(VARIABLES.len(), ' ')));
    // Standard output is the guest's console. With a group of its own, all that the command starts can be ended with it.
    shell.stdin(Stdio::null()).stdout(io::stderr()).process_group(0);
    let state = change.split(' ').next().unwrap_or_default();
    match shell.spawn() {
        Ok(child) => match wait(child, limit) {
            Ok(Some(status)) if status.success() => {}
            Ok(Some(status)) => warn!("the command of --hook failed for {state}: {}", cause(status)),
            Ok(None) => warn!("the command of --hook was killed: it ran for {limit:?} for {state}"),
            Err(e) => warn!("the command of --hook cannot be waited for: {e}"),
        },
        Err(e) => warn!("the command of --hook cannot be run for {state}: {e}"),
    }
}

fn cause(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    }
}

/// Waits for the end of the command, and kills its process group if it lasts longer than `limit`: then there is no status.
fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    if let Some(status) = wait_until(&mut child, Instant::now() + limit)? {
        return Ok(Some(status));
    }
    killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
    wait_until(&mut child, Instant::now() + KILL_PATIENCE)?;
    Ok(None)
}

fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= deadline {
            return Ok(status);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}
