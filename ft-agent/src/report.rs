//! What commands print on standard output.

use std::io::{self, ErrorKind};

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
