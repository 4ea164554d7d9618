//! The guest's console: copied to standard output without ever delaying the replica, and connected with `vmft
//! console`.

use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use entry::Console;

use super::replica::Replica;
use crate::error::Error;
use crate::outside::console::KeyFilter;
use crate::outside::terminal::RawMode;

/// Copies what the guest prints to standard output, on a thread of its own.
///
/// # Errors
/// The thread cannot be started.
pub fn copy_to_stdout(reader: Receiver<Arc<[u8]>>) -> Result<(), Error> {
    let copy = move || {
        for bytes in reader {
            let mut out = std::io::stdout().lock();
            // Nobody reads standard output any more; the guest goes on.
            if out.write_all(&bytes).and_then(|()| out.flush()).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("console".into()).spawn(copy);
    thread.map(drop).map_err(Error::host("cannot start the console thread"))
}

/// Connects a client of the control socket with the guest's console, until the client or the replica ends.
///
/// # Errors
/// The client is gone.
pub fn serve_client(replica: &Arc<Replica>, client: UnixStream) -> std::io::Result<()> {
    client.set_read_timeout(None)?;
    let output = replica.read_console();
    let mut keys = client.try_clone()?;
    let typist = replica.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(n @ 1..) = keys.read(&mut buffer) {
            typist.type_text(Console::Serial, &buffer[..n]);
        }
    });
    let mut client = client;
    loop {
        match output.recv_timeout(Duration::from_millis(500)) {
            Ok(bytes) => client.write_all(&bytes)?,
            Err(RecvTimeoutError::Timeout) if !replica.is_out() => {}
            Err(_) => return client.shutdown(std::net::Shutdown::Both),
        }
    }
}

/// The client's side of [`serve_client`]: connects the terminal with the control socket.
///
/// # Errors
/// The terminal cannot be used, or standard output is closed.
pub fn run_client(mut socket: BufReader<UnixStream>) -> Result<(), Error> {
    let terminal = RawMode::enter().map_err(Error::host("cannot set the terminal to raw mode"))?;
    let mut typed = socket.get_ref().try_clone().map_err(Error::host("cannot use the control socket"))?;
    std::thread::spawn(move || {
        let (mut keys, mut buffer) = (KeyFilter::default(), [0; 256]);
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
            let (text, quit) = keys.filter(&buffer[..n]);
            if typed.write_all(&text).is_err() || quit {
                break;
            }
        }
        // This fails if the replica has closed the connection already.
        typed.shutdown(std::net::Shutdown::Both).ok();
    });
    let mut buffer = [0; 4096];
    let mut out = std::io::stdout();
    while let Ok(n @ 1..) = socket.read(&mut buffer) {
        out.write_all(&buffer[..n])
            .and_then(|()| out.flush())
            .map_err(Error::host("cannot write to standard output"))?;
    }
    drop(terminal);
    Ok(())
}
