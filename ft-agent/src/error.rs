//! The errors that end the program, sorted by what the user can do about them.

use std::process::ExitCode;

use agent::Outcome;
use test_and_set::names::{Generation, VmName};
use vmm::bisect::FirstDifference;
use vmm::guest_loop::LoopError;
use vmm::replay::Divergence;
use vmm::{BootError, MachineError};

/// An error that ends the program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option, a field of a file or a file that an option names is wrong.
    #[error("{field}: {why}")]
    Config {
        /// The option or the field.
        field: String,
        /// What is wrong, and what to do about it.
        why: String,
    },
    /// The guest cannot be booted from these files.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine cannot be created, or its engine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Something on this host failed: a file, a device or a system call.
    #[error("{what}: {source}")]
    Host {
        /// What failed, with the file or device: `cannot write log run.log`.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The replay differs from the recording.
    #[error(transparent)]
    Divergence(Box<Divergence>),
    /// Two replays of one log differ, each time at the same position: this host or its engine cannot be trusted.
    #[error(transparent)]
    ReplaysDiffer(Box<FirstDifference>),
    /// Two replays of one log differed once, and did not when they were repeated.
    #[error(
        "two replays differed between positions {equal_at} and {differs_at}, but not when they were repeated: this host \
         does not always compute the same result; test its memory and CPU, or replay on another host"
    )]
    NotRepeatable {
        /// The last position at which the two replays were equal.
        equal_at: u64,
        /// The first position at which they were seen to differ.
        differs_at: u64,
    },
    /// The benchmark failed.
    #[error(transparent)]
    Bench(#[from] bench::BenchError),
    /// This side of a pair no longer runs the VM.
    #[error("{0}")]
    Out(agent::Outcome),
    /// According to the store the VM runs. If both hosts have died, the user has to say so.
    #[error(
        "the store has another generation of VM {vm}, {generation}: the VM runs elsewhere, {by}; if both its hosts have \
         died, run `vmft forget --name {vm} --store '{store}'` with an operator's keys in place of these, and start it again"
    )]
    RunsElsewhere {
        /// The VM.
        vm: VmName,
        /// The generation that is open.
        generation: Generation,
        /// Which hosts run it, by the store's record: `on host b, alone`.
        by: String,
        /// The store's URL.
        store: String,
    },
    /// A request was not carried out, for this reason, and the VM goes on where it ran.
    #[error("{0}")]
    NotDone(String),
    /// `vmft status` found a VM that is not protected: it would be lost with its host.
    #[error("the VM is not protected")]
    Unprotected,
    /// `vmft status`: the VM is at risk of what the status says.
    #[error("the VM is at risk")]
    AtRisk,
    /// The run is over, or was given up, and the guest has not printed the text of `--until`.
    #[error("the guest has not printed {text:?}: {why}")]
    NotPrinted {
        /// The text.
        text: String,
        /// Why the run is over.
        why: String,
    },
    /// The guest crashed: its CPU shut down (triple fault).
    #[error("the guest crashed (triple fault) at position {position}")]
    GuestCrash {
        /// The position of the guest at the crash.
        position: u64,
    },
}

impl Error {
    /// An option or a field that is wrong: `why` says what is wrong with it and what to do.
    pub fn config(field: &str, why: impl Into<String>) -> Error {
        Error::Config { field: field.into(), why: why.into() }
    }

    /// For `map_err`: an error of this host; `what` says what failed (`cannot open tap web0`).
    pub fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |source| Error::Host { what, source }
    }

    /// The exit code of the process: 1 not protected (`vmft status`) or not done (`vmft failover`, `vmft stop`),
    /// 2 configuration, 3 host, 4 guest crash, 5 divergence, 6 fenced (the other side runs the VM, or it was forgotten or
    /// started elsewhere), 7 not started (the VM runs elsewhere, the store refuses to open it, or the peer was lost before the
    /// guest ran), 8 at risk (`vmft status`), 9 the guest has not printed what was waited for.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// [`Error::exit_code`] as a number.
    pub fn code(&self) -> u8 {
        match self {
            Error::Config { .. } | Error::Boot(_) => 2,
            Error::Machine(MachineError::Config(_) | MachineError::Boot(_)) => 2,
            Error::Bench(bench::BenchError::Only(..)) => 2,
            Error::Machine(_) | Error::Host { .. } | Error::Bench(_) => 3,
            Error::GuestCrash { .. } => 4,
            Error::Divergence(_) | Error::ReplaysDiffer(_) | Error::NotRepeatable { .. } => 5,
            Error::Unprotected | Error::NotDone(_) => 1,
            Error::AtRisk => 8,
            Error::Out(
                Outcome::Fenced(_) | Outcome::Forgotten | Outcome::Overtaken(_) | Outcome::Yielded(_),
            ) => 6,
            Error::RunsElsewhere { .. }
            | Error::Out(Outcome::NotOpened | Outcome::OpenRefused(_) | Outcome::NotStarted(_)) => 7,
            Error::NotPrinted { .. } => 9,
            Error::Out(Outcome::Failed(_)) => 3,
            Error::Out(Outcome::Ended(_) | Outcome::HandedOver | Outcome::Stopped) => 0,
        }
    }
}

impl From<LoopError<Error>> for Error {
    fn from(e: LoopError<Error>) -> Error {
        match e {
            LoopError::Machine(e) => Error::Machine(e),
            LoopError::Source(e) => e,
        }
    }
}
