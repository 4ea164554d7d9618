//! The guest's console: copied to standard output without ever delaying the replica, and connected with `vmft
//! console`.

use std::io::{BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use entry::Console;
use host_log::descriptor::SharedOutput;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::warn;

use super::replica::Replica;
use crate::error::Error;
use crate::outside::console::KeyFilter;
use crate::outside::terminal::{IgnoredSignals, OnSignal, Terminal};
use crate::report::{self, printed};

/// How many clients may be connected with the console.
const CLIENTS_MAX: usize = 16;
/// Time between two looks whether a client or the replica is gone.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

static CLIENTS: AtomicUsize = AtomicUsize::new(0);

/// Copies what the guest prints to standard output, on a thread of its own. What standard output does not take is missing
/// there; if it takes nothing for a while, the queue overflows, and pieces are left out.
///
/// # Errors
/// The thread cannot be started.
pub fn copy_to_stdout(reader: Receiver<Arc<[u8]>>) -> Result<(), Error> {
    let copy = move || {
        let (mut out, mut told) = (SharedOutput(std::io::stdout()), false);
        for bytes in reader {
            if let Err(e) = out.write_all(&bytes)
                && !std::mem::replace(&mut told, true)
            {
                warn!(
                    "standard output does not take what the guest prints; some of it is missing there: {e}"
                );
            }
        }
    };
    let thread = std::thread::Builder::new().name("console".into()).spawn(copy);
    thread.map(drop).map_err(Error::host("cannot start the console thread"))
}

/// The place of a client that is connected with the console.
pub struct ConsolePlace(());

impl ConsolePlace {
    /// A place, if one is free.
    pub fn take() -> Option<ConsolePlace> {
        let place = ConsolePlace(());
        (CLIENTS.fetch_add(1, Ordering::Relaxed) < CLIENTS_MAX).then_some(place)
    }
}

impl Drop for ConsolePlace {
    fn drop(&mut self) {
        CLIENTS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connects a client of the control socket with the guest's console, until the client or the replica ends, or the client does
/// not read.
///
/// # Errors
/// The client is gone, or no thread can be started for it.
pub fn serve_client(replica: &Arc<Replica>, client: UnixStream) -> std::io::Result<()> {
    let served = copy_both_ways(replica, &client);
    // The thread that reads its keys ends with this. It fails if the client has closed the connection.
    client.shutdown(std::net::Shutdown::Both).ok();
    served
}

fn copy_both_ways(replica: &Arc<Replica>, mut client: &UnixStream) -> std::io::Result<()> {
    client.set_read_timeout(None)?;
    let output = replica.read_console();
    let mut keys = client.try_clone()?;
    let typist = replica.clone();
    let type_keys = move || {
        let mut buffer = [0; 256];
        while let Ok(n @ 1..) = keys.read(&mut buffer) {
            typist.type_text(Console::Serial, &buffer[..n]);
        }
    };
    std::thread::Builder::new().name("keys".into()).spawn(type_keys)?;
    loop {
        match output.recv_timeout(LOOK_INTERVAL) {
            Ok(bytes) => client.write_all(&bytes)?,
            Err(RecvTimeoutError::Timeout) if !replica.is_out() && !has_hung_up(client)? => {}
            Err(_) => return Ok(()),
        }
    }
}

/// Whether the other side has closed the connection; one that only writes nothing more still reads.
fn has_hung_up(client: &UnixStream) -> std::io::Result<bool> {
    let mut asked = [PollFd::new(client.as_fd(), PollFlags::empty())];
    poll(&mut asked, PollTimeout::ZERO)?;
    Ok(asked[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)))
}

/// The client's side of [`serve_client`]: connects the terminal with the control socket.
///
/// # Errors
/// The terminal cannot be used, or standard output is closed.
pub fn run_client(mut socket: BufReader<UnixStream>) -> Result<(), Error> {
    let terminal = Terminal::attach(IgnoredSignals::read(), || OnSignal::End)?;
    let mut typed = socket.get_ref().try_clone().map_err(Error::host("cannot use the control socket"))?;
    let mut keys = terminal.keys();
    std::thread::spawn(move || {
        let (mut filter, mut buffer) = (KeyFilter::default(), [0; 256]);
        while let Ok(n @ 1..) = keys.read(&mut buffer) {
            let (text, quit) = filter.filter(&buffer[..n]);
            if typed.write_all(&text).is_err() || quit {
                break;
            }
        }
        // This fails if the replica has closed the connection already.
        typed.shutdown(std::net::Shutdown::Both).ok();
    });
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = socket.read(&mut buffer) {
        if !printed(report::stdout().write_all(&buffer[..n]))? {
            break;
        }
    }
    drop(terminal);
    Ok(())
}
