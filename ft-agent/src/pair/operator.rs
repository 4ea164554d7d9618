//! The operator's commands that change something: `vmft failover`, `vmft stop` and `vmft console`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use super::console::run_client;
use super::control::{ControlReply, ControlRequest, ask};
use crate::error::Error;

/// Which replica a command talks to.
#[derive(Args, Debug)]
pub struct ControlArgs {
    /// Control socket of the replica
    #[arg(long, value_name = "FILE")]
    control: PathBuf,
}

impl ControlArgs {
    /// The control socket.
    pub fn path(&self) -> &Path {
        &self.control
    }
}

/// The arguments of `vmft stop`.
#[derive(Args, Debug)]
pub struct StopArgs {
    #[command(flatten)]
    control: ControlArgs,
    /// Confirm that the VM may end: what is only in its memory is lost
    #[arg(long)]
    yes: bool,
    /// End this host's part only, as a shutdown of the host does: a primary hands over, a backup leaves, and only a
    /// side that is alone ends the VM
    #[arg(long)]
    this_host: bool,
}

/// `vmft failover`: a handover of the VM to the backup. It waits for the outcome, and says who runs the VM.
///
/// # Errors
/// The replica does not answer, or refuses; or the VM goes on where it ran.
pub fn failover(args: &ControlArgs) -> Result<(), Error> {
    request(args.path(), ControlRequest::Failover)
}

/// `vmft stop`: ends the VM's run on both sides, or this side.
///
/// # Errors
/// The end is not confirmed; the replica does not answer, or refuses; or the VM goes on.
pub fn stop(args: &StopArgs) -> Result<(), Error> {
    let path = args.control.path();
    match (args.this_host, args.yes) {
        (false, false) => Err(Error::config("yes", unconfirmed(path)?)),
        (false, true) => request(path, ControlRequest::Stop),
        (true, false) => request(path, ControlRequest::Leave),
        (true, true) => request(path, ControlRequest::LeaveOrEnd),
    }
}

/// What would be lost by an end of the VM.
fn unconfirmed(path: &Path) -> Result<String, Error> {
    let (ControlReply::Status(report), _) = ask(path, ControlRequest::Status)? else {
        return Err(Error::config("control", format!("{} is no replica's socket", path.display())));
    };
    Ok(format!(
        "this ends VM {} on all its hosts: what is only in its memory and its connections are lost, and its disks are \
         as after a power cut unless the guest was shut down. Give --yes to do that; to end only this host's part, \
         give --this-host",
        report.name
    ))
}

fn request(path: &Path, request: ControlRequest) -> Result<(), Error> {
    match ask(path, request)?.0 {
        ControlReply::Outcome(words) => {
            writeln!(std::io::stdout(), "{words}").map_err(Error::host("cannot write to standard output"))?
        }
        ControlReply::NotDone(why) => return Err(Error::NotDone(why)),
        ControlReply::Done | ControlReply::Status(_) | ControlReply::Refused(_) => {}
    }
    Ok(())
}

/// `vmft console`: connects the terminal with the guest's console, until the replica ends or the user types
/// `Ctrl-A x`.
///
/// # Errors
/// The replica does not answer, or refuses, or the terminal cannot be used.
pub fn console(args: &ControlArgs) -> Result<(), Error> {
    let (_, socket) = ask(args.path(), ControlRequest::Console)?;
    run_client(socket)
}
