//! The user's terminal as the guest's console: raw while the guest runs in the foreground, and as it was before whenever
//! the shell has it.
//!
//! A terminal belongs to its foreground process group. A process in the background leaves its mode and its keys alone,
//! because a shell uses it, and because the kernel would stop the process (SIGTTOU, SIGTTIN).

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::emulate_default_handler;

use crate::error::Error;

/// How often to look whether this process is in the foreground, ms.
const LOOK_MS: u8 = 100;

/// Signals that end a process which does not handle them.
const ENDING: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// What a signal that ends a process does to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSignal {
    /// The process goes on, or ends in order.
    Handled,
    /// The process is ended by the signal, once the terminal is as it was before.
    End,
}

/// Standard input in raw mode for as long as this lives, if it is a terminal and whenever this process is in the
/// foreground. However the process ends or is stopped, other than by SIGKILL and SIGSTOP, the terminal is as it was
/// before.
pub struct Terminal {
    mode: Arc<TerminalMode>,
    signals: Handle,
}

impl Terminal {
    /// Makes standard input raw, and handles signals from here on. `on_signal` is called for each that would end the
    /// process; those that are ignored (as `nohup` does) stay ignored.
    ///
    /// # Errors
    /// The terminal's mode cannot be changed, or the signal handlers cannot be installed.
    pub fn attach(
        ignored: IgnoredSignals,
        mut on_signal: impl FnMut() -> OnSignal + Send + 'static,
    ) -> Result<Terminal, Error> {
        let caught = ENDING.into_iter().filter(|signal| !ignored.contains(*signal));
        let signals = Signals::new(caught.chain([SIGTSTP, SIGCONT]));
        let mut signals = signals.map_err(Error::host("cannot install signal handlers"))?;
        let terminal = Terminal { mode: Arc::default(), signals: signals.handle() };
        terminal.mode.take().map_err(Error::host("cannot set the terminal to raw mode"))?;
        let mode = terminal.mode.clone();
        let handle = move || {
            for signal in signals.forever() {
                match signal {
                    SIGCONT => mode.take_again(),
                    SIGTSTP => {
                        mode.give_back();
                        end_by(signal);
                    }
                    _ if on_signal() == OnSignal::End => {
                        mode.give_back();
                        end_by(signal);
                    }
                    _ => {}
                }
            }
        };
        let thread = std::thread::Builder::new().name("signals".into()).spawn(handle);
        thread.map_err(Error::host("cannot start the thread for signals"))?;
        Ok(terminal)
    }
}

impl Terminal {
    /// What is typed on it.
    pub fn keys(&self) -> TypedKeys {
        TypedKeys(self.mode.clone())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.signals.close();
        self.mode.give_back();
    }
}

/// Does what a signal does by default: it ends or stops this process.
fn end_by(signal: i32) {
    if let Err(e) = emulate_default_handler(signal) {
        host_log::say!("vmft: cannot raise signal {signal}: {e}");
    }
}

/// The signals that this process was started to ignore: a bit for each from signal 1 on.
#[derive(Clone, Copy, Debug, Default)]
pub struct IgnoredSignals(u64);

impl IgnoredSignals {
    /// Reads them, while the process may read files; none if the host does not say.
    pub fn read() -> IgnoredSignals {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        IgnoredSignals(mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0))
    }

    fn contains(self, signal: i32) -> bool {
        self.0 & 1 << (signal - 1) != 0
    }
}

#[derive(Default)]
struct TerminalMode(Mutex<ModeState>);

#[derive(Default)]
struct ModeState {
    /// The mode to restore, from when the terminal was first made raw until it is given back.
    before: Option<Termios>,
    /// This process has made it raw, and nobody has changed that.
    is_raw: bool,
    /// It is not to be made raw: this process is about to stop or to end.
    is_given_back: bool,
}

impl TerminalMode {
    fn lock(&self) -> MutexGuard<'_, ModeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the terminal raw, unless it is, or another program has it. Output processing stays on, so that the lines of
    /// vmft's own messages still start in the first column.
    fn take(&self) -> io::Result<()> {
        let mut state = self.lock();
        if state.is_raw || state.is_given_back || !may_use_terminal() {
            return Ok(());
        }
        let stdin = io::stdin();
        // After SIGSTOP, the shell may have put back the mode that it found then, which was raw.
        let before = match &state.before {
            Some(before) => before.clone(),
            None => tcgetattr(&stdin)?,
        };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        raw.output_flags = before.output_flags;
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        state.before = Some(before);
        state.is_raw = true;
        Ok(())
    }

    /// The same, while the program runs.
    fn take_or_tell(&self) {
        if let Err(e) = self.take() {
            host_log::say!("vmft: cannot set the terminal to raw mode: {e}");
            self.lock().is_given_back = true;
        }
    }

    /// After the process was stopped: takes the terminal, if this process is in the foreground again.
    fn take_again(&self) {
        let mut state = self.lock();
        (state.is_raw, state.is_given_back) = (false, false);
        drop(state);
        self.take_or_tell();
    }

    /// Restores the terminal, unless another program has it now, and leaves it alone from here on.
    fn give_back(&self) {
        let mut state = self.lock();
        (state.is_raw, state.is_given_back) = (false, true);
        if !may_use_terminal() {
            return;
        }
        let Some(before) = state.before.take() else { return };
        match tcsetattr(io::stdin(), SetArg::TCSANOW, &before) {
            // It was hung up.
            Ok(()) | Err(Errno::EIO) => {}
            Err(e) => host_log::say!("vmft: cannot restore the terminal: {e}; run `stty sane`"),
        }
    }
}

/// Whether standard input is a terminal that this process may use.
fn may_use_terminal() -> bool {
    io::stdin().is_terminal() && is_in_foreground()
}

/// Whether this process is in the foreground of the terminal, or has no job control there: it is not the controlling
/// terminal, or was hung up.
fn is_in_foreground() -> bool {
    tcgetpgrp(io::stdin()).map_or(true, |group| group == getpgrp())
}

/// What is typed on standard input.
pub struct TypedKeys(Arc<TerminalMode>);

impl TypedKeys {
    /// Waits for keys, and reads them; 0 at the end. While another program has the terminal its keys are not read. A shell
    /// that brings a running process to the foreground does not tell it, so this looks from time to time.
    ///
    /// # Errors
    /// Standard input cannot be read.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stdin = io::stdin();
        let is_terminal = stdin.is_terminal();
        let patience = if is_terminal { PollTimeout::from(LOOK_MS) } else { PollTimeout::NONE };
        // Then the kernel fails a read that comes too late, instead of stopping the process.
        SigSet::from(Signal::SIGTTIN).thread_block()?;
        loop {
            if is_terminal && !is_in_foreground() {
                std::thread::sleep(Duration::from_millis(LOOK_MS.into()));
                continue;
            }
            self.0.take_or_tell();
            match poll(&mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)], patience) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
            // The process may have been stopped meanwhile.
            if is_terminal && !is_in_foreground() {
                continue;
            }
            match nix::unistd::read(&stdin, buffer) {
                // Others may have made it non-blocking, and may have read what was there.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(Errno::EIO) if !is_in_foreground() => {}
                result => return Ok(result?),
            }
        }
    }
}
