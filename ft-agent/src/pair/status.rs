//! The commands that talk to a running replica: `vmft status`, `failover`, `stop` and `console`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::console::run_client;
use super::control::{ControlReply, ControlRequest, ask};
use crate::error::Error;
use crate::report::print;

/// The arguments of `vmft status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    control: ControlArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Repeat every second until interrupted
    #[arg(long)]
    watch: bool,
}

/// Which replica a command talks to.
#[derive(Args, Debug)]
pub struct ControlArgs {
    /// Control socket of the replica
    #[arg(long, value_name = "FILE")]
    control: PathBuf,
}

/// `vmft status`: shows the status of a replica.
///
/// # Errors
/// The replica does not answer, or the VM is not protected.
pub fn status(args: &StatusArgs) -> Result<(), Error> {
    loop {
        let path = &args.control.control;
        let (ControlReply::Status(report), _) = ask(path, ControlRequest::Status)? else {
            let why = format!("{} is the socket of another program, not of a replica", path.display());
            return Err(Error::config("control", why));
        };
        let text = match args.json {
            true => serde_json::to_string(&report).unwrap_or_else(|e| unreachable!("plain data: {e}")) + "\n",
            false => report.to_string(),
        };
        // Whoever has closed standard output may still want the exit code.
        let is_read = print(&text)?;
        if !args.watch || !is_read {
            return report.check_protected();
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// `vmft failover`: hands the VM over to the backup.
///
/// # Errors
/// The replica does not answer, or refuses.
pub fn failover(args: &ControlArgs) -> Result<(), Error> {
    ask(&args.control, ControlRequest::Failover).map(drop)
}

/// `vmft stop`: ends the VM's run on both sides.
///
/// # Errors
/// The replica does not answer, or refuses.
pub fn stop(args: &ControlArgs) -> Result<(), Error> {
    ask(&args.control, ControlRequest::Stop).map(drop)
}

/// `vmft console`: connects the terminal with the guest's console, until the replica ends or the user types
/// `Ctrl-A x`.
///
/// # Errors
/// The replica does not answer, or refuses, or the terminal cannot be used.
pub fn console(args: &ControlArgs) -> Result<(), Error> {
    let (_, socket) = ask(&args.control, ControlRequest::Console)?;
    run_client(socket)
}
