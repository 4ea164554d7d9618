//! What commands print on standard output, and how they end when that or standard error cannot be written.

use std::fmt;
use std::io::{self, ErrorKind, Stdout, Write};
use std::process::ExitCode;

use host_log::descriptor::SharedOutput;

use crate::error::Error;

/// Whether more can be printed: false if the reader has closed standard output, as `head` does.
///
/// # Errors
/// Standard output cannot be written to for another reason.
pub fn printed(result: io::Result<()>) -> Result<bool, Error> {
    match result {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).map_err(Error::host("cannot write to standard output")),
    }
}

/// Prints a text on standard output. False: its reader has closed it.
///
/// # Errors
/// Standard output cannot be written to for another reason.
pub fn print(text: &str) -> Result<bool, Error> {
    printed(stdout().write_all(text.as_bytes()))
}

/// Standard output, without a buffer.
pub fn stdout() -> SharedOutput<Stdout> {
    SharedOutput(io::stdout())
}

/// A text with its control characters escaped, but for the ends of its lines.
pub fn escaped_lines(text: &str) -> String {
    text.lines().map(|line| Escaped(line).to_string()).collect::<Vec<_>>().join("\n")
}

/// Whether all that the command has told was written, or nobody wanted to read it.
///
/// # Errors
/// Standard error could not be written to, for example because its disk is full.
pub fn told() -> Result<(), Error> {
    if host_log::is_text_lost() {
        let source = io::Error::other("something that this command had to say is lost");
        return Err(Error::Host { what: "cannot write to standard error".into(), source });
    }
    Ok(())
}

/// Prints what clap has to say: an error in the options, or the help that was asked for. Returns the exit code.
pub fn usage(answer: &clap::Error) -> ExitCode {
    let wrong = answer.use_stderr();
    match answer.print() {
        _ if wrong => ExitCode::from(2),
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            host_log::say!("vmft: cannot write to standard output: {e}");
            ExitCode::from(3)
        }
        _ => ExitCode::SUCCESS,
    }
}

/// A text that others have written, with its control characters escaped: they would move a terminal's cursor, or
/// more.
pub struct Escaped<T>(pub T);

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);
        impl fmt::Write for Escaping<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                text.chars().try_for_each(|c| match is_control(c) {
                    true => write!(self.0, "{}", c.escape_default()),
                    false => self.0.write_char(c),
                })
            }
        }
        use fmt::Write;
        write!(Escaping(f), "{}", self.0)
    }
}

/// Whether a terminal may do something else with a character than to show it: control characters, and those that change
/// the direction of text.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_of_others_are_escaped() {
        let text = "a\x1b[2J\u{9b}1m\rb\u{202e}c\té";
        assert_eq!(Escaped(text).to_string(), "a\\u{1b}[2J\\u{9b}1m\\rb\\u{202e}c\\té");
    }
}
