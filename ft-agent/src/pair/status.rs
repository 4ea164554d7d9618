//! `vmft status`: what a running replica reports.

use std::time::Duration;

use clap::Args;

use super::control::{ControlReply, ControlRequest, ask};
use super::operator::ControlArgs;
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

/// `vmft status`: shows the status of a replica.
///
/// # Errors
/// The replica does not answer, or the VM is not protected.
pub fn status(args: &StatusArgs) -> Result<(), Error> {
    loop {
        let path = args.control.path();
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
