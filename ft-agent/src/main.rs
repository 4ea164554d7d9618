//! vmft: a virtual machine that goes on running when the host under it dies.

mod confine;
mod doctor;
mod engine;
mod error;
mod failpoint;
mod guest;
mod image_list;
mod images;
mod log_command;
mod log_file;
mod options;
mod outside;
mod pair;
mod replay;
mod run;
mod summary;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use error::Error;

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
    /// Run a guest and write a log from which it can be replayed
    Record(run::RecordArgs),
    /// Replay a log, checking every output and state on the way
    Replay(replay::ReplayArgs),
    /// Run a guest that outlives this host: record it for a backup
    Primary(pair::PairOptions),
    /// Stand by for a primary: replay its guest, and go live when it is lost
    Backup(pair::PairOptions),
    /// Tell how a replica is; exit code 0 if the VM is protected, 1 if not
    Status(pair::StatusArgs),
    /// Let the backup go on in the primary's place, without losing anything
    Failover(pair::At),
    /// End the run of a VM on both sides
    Stop(pair::At),
    /// Attach to the console of the guest; Ctrl-A x leaves it
    Console(pair::At),
    /// Measure what protection costs: a protected guest beside the same guest unprotected
    Bench(bench::BenchArgs),
    /// Let a VM start again whose hosts have all died
    Forget(pair::ForgetArgs),
    /// Tell what this host can do for guests on KVM
    Doctor(doctor::DoctorArgs),
    /// Tell what is in a log
    #[command(subcommand)]
    Log(log_command::LogCommand),
}

fn main() -> ExitCode {
    // A wrong flag is bad configuration: clap's own code for it is 2 as well.
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Record(args) => run::record(args),
        Command::Replay(args) => replay::run(&args),
        Command::Primary(options) => pair::primary(options),
        Command::Backup(options) => pair::backup(options),
        Command::Status(args) => pair::status(&args),
        Command::Failover(at) => pair::failover(&at),
        Command::Stop(at) => pair::stop(&at),
        Command::Console(at) => pair::console(&at),
        Command::Bench(args) => bench::run(&args).map_err(Error::from),
        Command::Forget(args) => pair::forget(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Log(command) => log_command::run(command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vmft: {e}");
            e.exit_code()
        }
    }
}
