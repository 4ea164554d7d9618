//! The user's terminal as the guest's console: raw while the guest runs, and restored however that ends.

use std::io::{self, IsTerminal};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Standard input in raw mode for as long as this lives.
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Makes standard input raw if it is a terminal. Output processing stays on, so that the lines of vmft's own messages
    /// still start in the first column.
    ///
    /// # Errors
    /// The terminal's mode cannot be changed.
    pub fn enter() -> io::Result<Option<RawMode>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        raw.output_flags = before.output_flags;
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Some(RawMode { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(e) = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before) {
            host_log::say!("vmft: cannot restore the terminal: {e}; run `stty sane`");
        }
    }
}
