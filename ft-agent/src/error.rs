//! What may go wrong, sorted by what the user can do about it.

use std::process::ExitCode;

use agent::Exit;
use test_and_set::names::{Generation, VmName};
use vmm::guest_loop::LoopError;
use vmm::narrow::Parting;
use vmm::replay::Divergence;
use vmm::{BootError, MachineError};

/// An error that ends the program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user asked for something that cannot be.
    #[error("{field}: {why}")]
    Config {
        /// The option or field.
        field: String,
        /// What is wrong with it, and what would be right.
        why: String,
    },
    /// The guest cannot be booted from these files.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine cannot be made, or its engine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// This host cannot do its part.
    #[error("{what}: {source}")]
    Host {
        /// What was being done, with the file or device.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Replay and recording differ.
    #[error(transparent)]
    Divergence(Box<Divergence>),
    /// Two replays of one log differ: this host or its engine is to be mistrusted.
    #[error(transparent)]
    Parting(Box<Parting>),
    /// Two replays of one log differed, and not again.
    #[error(
        "two replays differed between the positions {equal_at} and {differs_at}, but not when they were repeated: this \
         host does not always compute the same"
    )]
    Unsteady {
        /// Equal here.
        equal_at: u64,
        /// Different here.
        differs_at: u64,
    },
    /// What protection costs could not be measured.
    #[error(transparent)]
    Bench(#[from] bench::Error),
    /// This side of a pair is out.
    #[error("{0}")]
    Out(agent::Exit),
    /// The store's record says that the VM runs. Where both hosts have died, the user has to say so.
    #[error(
        "the store has another generation of VM {vm}, {generation}: the VM runs elsewhere, or both its hosts have died and \
         `vmft forget --name {vm} --store '{store}'` lets it start again"
    )]
    Running {
        /// The VM.
        vm: VmName,
        /// The generation that is open.
        generation: Generation,
        /// The store's URL.
        store: String,
    },
    /// `vmft status` found a VM whose host may not die.
    #[error("the VM is not protected")]
    Unprotected,
    /// The guest crashed: its CPU shut down (triple fault).
    #[error("the guest crashed (triple fault) at position {position}")]
    GuestCrash {
        /// Where.
        position: u64,
    },
}

impl Error {
    /// A bad option.
    pub fn config(field: &str, why: impl Into<String>) -> Error {
        Error::Config { field: field.into(), why: why.into() }
    }

    /// For `map_err`: a failure of this host while doing `what`.
    pub fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |source| Error::Host { what, source }
    }

    /// The process' exit code: 1 unprotected (`vmft status`), 2 configuration, 3 host, 4 guest crash, 5 divergence, 6 fenced
    /// (the other side lives), 7 not started (the VM runs elsewhere, or the peer was lost before the guest ran).
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// [`Error::exit_code`] as a number.
    pub fn code(&self) -> u8 {
        match self {
            Error::Config { .. } | Error::Boot(_) => 2,
            Error::Machine(MachineError::Config(_) | MachineError::Boot(_)) => 2,
            Error::Bench(bench::Error::Only(..)) => 2,
            Error::Machine(_) | Error::Host { .. } | Error::Bench(_) => 3,
            Error::GuestCrash { .. } => 4,
            Error::Divergence(_) | Error::Parting(_) | Error::Unsteady { .. } => 5,
            Error::Unprotected => 1,
            Error::Out(Exit::Fenced(_)) => 6,
            Error::Running { .. } | Error::Out(Exit::NotOpened | Exit::NotStarted(_)) => 7,
            Error::Out(Exit::Failed(_)) => 3,
            Error::Out(Exit::Ended(_) | Exit::HandedOver | Exit::Stopped) => 0,
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
