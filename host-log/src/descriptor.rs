//! Writing to a descriptor that others share: whether it is non-blocking is theirs to say.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// How long to wait if the descriptor is said to be ready and takes nothing.
const PAUSE: Duration = Duration::from_millis(10);

/// A descriptor to which writing takes as long as it takes, also if somebody has made it non-blocking. Nothing is buffered here.
#[derive(Debug)]
pub struct SharedOutput<F>(pub F);

impl<F: AsFd> Write for SharedOutput<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut refused = false;
        loop {
            match rustix::io::write(&self.0, bytes) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if std::mem::replace(&mut refused, true) {
                        std::thread::sleep(PAUSE);
                    }
                    match poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
