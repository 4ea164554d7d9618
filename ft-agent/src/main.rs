//! vmft: virtual machines that survive the death of their host.

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
mod private_file;
mod replay;
mod report;
mod run;
mod service;
mod summary;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use error::Error;

/// Virtual machines that survive the death of their host
#[derive(Parser)]
#[command(name = "vmft", version)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Subcommand)]
enum CliCommand {
    /// Run a guest without protection
    Run(run::RunArgs),
    /// Run a guest and write a log from which it can be replayed
    Record(run::RecordArgs),
    /// Replay a log, and check every output and every recorded state
    Replay(replay::ReplayArgs),
    /// Run a guest with protection: record it for a backup on another host
    Primary(pair::PairOptions),
    /// Protect a primary's guest: replay it, and go live when the primary is lost
    Backup(pair::PairOptions),
    /// Keep the keys of a replica, which starts this itself
    #[command(hide = true)]
    Keeper(pair::KeeperArgs),
    /// Show a replica's status; exit code 0 if the VM is PROTECTED, 8 if AT RISK, 1 if UNPROTECTED
    Status(pair::StatusArgs),
    /// Hand the guest over to the backup, and wait until it runs there: nothing is lost
    Failover(pair::ControlArgs),
    /// Stop a VM on both sides, or end one of them
    Stop(pair::StopArgs),
    /// Attach to the guest's console; Ctrl-A x detaches
    Console(pair::ControlArgs),
    /// Measure what protection costs: load a protected guest and the same guest unprotected
    Bench(bench::BenchArgs),
    /// Allow a VM to start again after all its hosts have died
    Forget(pair::ForgetArgs),
    /// Run the command of --hook for each change that comes on standard input; for the replica
    #[command(hide = true)]
    HookRunner(pair::HookRunnerArgs),
    /// Test which engines this host supports, and say why it does not support the others
    Doctor(doctor::DoctorArgs),
    /// Show what is in a log
    #[command(subcommand)]
    Log(log_command::LogCommand),
}

fn main() -> ExitCode {
    no_core_dumps();
    // clap exits with 2 for a wrong flag, which is also the code for bad configuration.
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => return report::usage(&answer),
    };
    host_log::init();
    let result = match cli.command {
        CliCommand::Run(args) => run::run(args),
        CliCommand::Record(args) => run::record(args),
        CliCommand::Replay(args) => replay::run(&args),
        CliCommand::Primary(options) => pair::primary(options),
        CliCommand::Backup(options) => pair::backup(options),
        CliCommand::Keeper(args) => pair::keeper(&args),
        CliCommand::Status(args) => pair::status(&args),
        CliCommand::Failover(at) => pair::failover(&at),
        CliCommand::Stop(at) => pair::stop(&at),
        CliCommand::Console(at) => pair::console(&at),
        CliCommand::Bench(args) => bench::run(&args).map_err(Error::from),
        CliCommand::Forget(args) => pair::forget(&args),
        CliCommand::HookRunner(args) => pair::hook_runner(args),
        CliCommand::Doctor(args) => doctor::run(&args),
        CliCommand::Log(command) => log_command::run(command),
    };
    let code = result.and_then(|()| report::told()).map_or_else(
        |e| {
            tracing::error!("vmft: {}", report::escaped_lines(&e.to_string()));
            e.exit_code()
        },
        |()| ExitCode::SUCCESS,
    );
    host_log::flush();
    code
}

/// Keeps a crash of this process from leaving what it has in memory, a guest and keys, in a file or with another program.
fn no_core_dumps() {
    if let Err(e) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        host_log::say!("vmft: a crash may leave a core dump, with the guest's memory: {e}");
    }
}
