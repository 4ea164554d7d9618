//! Signals to a replica's process. None of them ends a side that runs the VM alone.

use std::sync::Arc;

use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator;
use signal_hook::low_level::signal_name;
use tracing::{info, warn};

use super::operated::{Operated, RequestOutcome, StoreNeed};
use crate::error::Error;
use crate::service;

/// Signals that end a process unless it does something about them. SIGXFSZ: a write beyond a limit of file sizes is an
/// error like any other.
const IGNORED: [i32; 12] = [
    SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGXCPU, SIGXFSZ, SIGPWR,
    SIGSTKFLT,
];
/// Linux's numbers of two signals that other systems do not have.
const SIGPWR: i32 = 30;
const SIGSTKFLT: i32 = 16;

/// The signals of this process, which are caught once in its life.
pub struct Signals(iterator::Signals);

impl Signals {
    /// Catches all signals but those that ask this side to end, which do so as long as it has nothing to lose.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub fn catch() -> Result<Signals, Error> {
        iterator::Signals::new(IGNORED).map(Signals).map_err(Error::host("cannot install signal handlers"))
    }

    /// From now on SIGTERM and SIGINT ask this side to leave: a primary hands over to its backup, a backup leaves, a
    /// waiting one ends. A side that is alone says what would be lost, and goes on.
    ///
    /// # Errors
    /// The handlers cannot be installed, or the thread cannot be started.
    pub fn obey(self, operated: Arc<Operated>) -> Result<(), Error> {
        for signal in [SIGINT, SIGTERM] {
            self.0.add_signal(signal).map_err(Error::host("cannot install signal handlers"))?;
        }
        let signals = std::sync::Mutex::new(self.0);
        service::start("signals", move || {
            let mut signals = signals.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            for signal in signals.forever() {
                received(signal, &operated);
            }
        })
    }
}

fn received(signal: i32, operated: &Operated) {
    let name = signal_name(signal).unwrap_or("a signal");
    if !matches!(signal, SIGINT | SIGTERM) {
        return info!("{name} is ignored: changed keys are read without it, and `vmft stop` ends a VM");
    }
    match operated.leave(StoreNeed::Wanted, false) {
        RequestOutcome::Done(words) => info!("{name}: {words}"),
        RequestOutcome::Refused(why) | RequestOutcome::NotDone(why) => warn!("{name}: {why}"),
    }
}
