//! The guest's console: to standard output without ever holding up the replica, and to `vmft console`.

use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use entry::Console;

use super::replica::Replica;
use crate::error::Error;
use crate::outside::console::Keys;
use crate::outside::terminal::RawMode;

/// Pieces of console output that may wait for who reads them; one who is slower misses some.
const BACKLOG: usize = 1024;

/// Everybody who reads the console.
#[derive(Default)]
pub struct Readers {
    readers: Vec<SyncSender<Arc<[u8]>>>,
}

impl Readers {
    /// Another reader.
    pub fn add(&mut self) -> Receiver<Arc<[u8]>> {
        let (sender, reader) = sync_channel(BACKLOG);
        self.readers.push(sender);
        reader
    }

    /// Tells all of them. Never waits.
    pub fn print(&mut self, bytes: &[u8]) {
        let bytes: Arc<[u8]> = bytes.into();
        self.readers
            .retain(|reader| !matches!(reader.try_send(bytes.clone()), Err(TrySendError::Disconnected(_))));
    }
}

/// Copies what the guest prints to standard output, from a thread of its own.
///
/// # Errors
/// There is no thread to be had.
pub fn to_stdout(reader: Receiver<Arc<[u8]>>) -> Result<(), Error> {
    let copy = move || {
        for bytes in reader {
            let mut out = std::io::stdout().lock();
            // Nobody reads it any more: the guest goes on.
            if out.write_all(&bytes).and_then(|()| out.flush()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("console".into()).spawn(copy).map(drop).map_err(Error::host("thread"))
}

/// Connects a client of the control socket with the console, until it goes or the replica is out.
///
/// # Errors
/// The client is gone.
pub fn attach(replica: &Arc<Replica>, client: UnixStream) -> std::io::Result<()> {
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

/// The client's side of it.
///
/// # Errors
/// There is no terminal to use, or standard output is gone.
pub fn talk(mut socket: BufReader<UnixStream>) -> Result<(), Error> {
    let terminal = RawMode::enter().map_err(Error::host("terminal"))?;
    let mut typed = socket.get_ref().try_clone().map_err(Error::host("control socket"))?;
    std::thread::spawn(move || {
        let (mut keys, mut buffer) = (Keys::default(), [0; 256]);
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
            let (text, quit) = keys.take(&buffer[..n]);
            if typed.write_all(&text).is_err() || quit {
                break;
            }
        }
        // The other end may be gone already.
        typed.shutdown(std::net::Shutdown::Both).ok();
    });
    let mut buffer = [0; 4096];
    let mut out = std::io::stdout();
    while let Ok(n @ 1..) = socket.read(&mut buffer) {
        out.write_all(&buffer[..n]).and_then(|()| out.flush()).map_err(Error::host("standard output"))?;
    }
    drop(terminal);
    Ok(())
}
