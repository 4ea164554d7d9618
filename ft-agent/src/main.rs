//! vmft: a virtual machine that goes on running when the host under it dies.

mod error;
mod images;
mod options;
mod outside;
mod run;
mod summary;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Virtual machines that survive the death of their host
#[derive(Parser)]
#[command(name = "vmft", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a guest alone
    Run(run::RunArgs),
}

fn main() -> ExitCode {
    // A wrong flag is bad configuration: clap's own code for it is 2 as well.
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(args) => run::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vmft: {e}");
            e.exit_code()
        }
    }
}
