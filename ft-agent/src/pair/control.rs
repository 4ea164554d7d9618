//! The control socket: `vmft status`, `vmft failover`, `vmft stop` and `vmft console` talk to a replica here.
//!
//! A Unix socket that only its owner may use. One request a connection, a line; the answer is one line of JSON, and for
//! `console` the guest's console in both directions after it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent::Phase;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::replica::Replica;
use super::status::Report;
use crate::error::Error;

/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest request, bytes.
const REQUEST_MAX: u64 = 64;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// What the replica knows of itself.
    Status,
    /// Let the other side go on.
    Failover,
    /// End the VM's run.
    Stop,
    /// The guest's console.
    Console,
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<Report>),
    /// It is being done.
    Done,
    /// It cannot be done.
    Refused(String),
}

/// A socket that is removed when this is dropped.
pub struct Control {
    path: PathBuf,
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            warn!("{}: {e}", self.path.display());
        }
    }
}

impl Control {
    /// Listens on a socket, for what `find` gives when somebody asks: there may be no replica yet.
    ///
    /// # Errors
    /// The socket cannot be made, or somebody listens there.
    pub fn listen(
        path: &Path,
        find: impl Fn() -> Option<Arc<Replica>> + Send + Sync + 'static,
    ) -> Result<Control, Error> {
        let named = || format!("control socket {}", path.display());
        if UnixStream::connect(path).is_ok() {
            return Err(Error::config("control", format!("{}: somebody listens there", path.display())));
        }
        // What a process that was killed has left.
        if path.exists() {
            std::fs::remove_file(path).map_err(Error::host(named()))?;
        }
        let listener = bind(path).map_err(Error::host(named()))?;
        let find = Arc::new(find);
        let accept = move || {
            for client in listener.incoming().flatten() {
                let find = find.clone();
                std::thread::spawn(move || {
                    // A client that goes away in the middle is its own affair.
                    serve(client, find()).ok();
                });
            }
        };
        std::thread::Builder::new().name("control".into()).spawn(accept).map_err(Error::host("thread"))?;
        Ok(Control { path: path.into() })
    }
}

/// A socket that is its owner's alone from its first moment on: Linux gives the file the mode of the unbound socket.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener.into())
}

fn serve(mut client: UnixStream, replica: Option<Arc<Replica>>) -> std::io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(client.try_clone()?.take(REQUEST_MAX)).read_line(&mut line)?;
    let request = serde_json::from_str::<Request>(&line);
    let (reply, console) = match (request, replica) {
        (Err(e), _) => (Reply::Refused(format!("{line:?} is no request: {e}")), None),
        (Ok(_), None) => (Reply::Refused("waiting for a primary".into()), None),
        (Ok(Request::Status), Some(replica)) => (Reply::Status(replica.report().into()), None),
        (Ok(Request::Failover), Some(replica)) => (failover(&replica), None),
        (Ok(Request::Stop), Some(replica)) => (stop(&replica), None),
        (Ok(Request::Console), Some(replica)) => (Reply::Done, Some(replica)),
    };
    let mut answer = serde_json::to_vec(&reply)?;
    answer.push(b'\n');
    client.write_all(&answer)?;
    match console {
        Some(replica) => super::console::attach(&replica, client),
        None => Ok(()),
    }
}

fn failover(replica: &Arc<Replica>) -> Reply {
    let status = replica.status();
    if status.role == agent::Role::Backup {
        return Reply::Refused("this is the backup: ask the primary".into());
    }
    if status.phase != Phase::Protected {
        return Reply::Refused("there is no backup that could go on".into());
    }
    replica.hand_over();
    Reply::Done
}

fn stop(replica: &Arc<Replica>) -> Reply {
    let status = replica.status();
    match (status.phase, status.role) {
        (Phase::Alone, _) | (Phase::Protected, agent::Role::Primary) => {
            replica.stop();
            Reply::Done
        }
        (Phase::Protected, agent::Role::Backup) => {
            Reply::Refused("this is the backup: ask the primary".into())
        }
        (phase, _) => Reply::Refused(format!("not now: {phase:?}")),
    }
}

/// Asks the replica that listens on a socket.
///
/// # Errors
/// Nobody listens there, or it refuses.
pub fn ask(path: &Path, request: Request) -> Result<(Reply, BufReader<UnixStream>), Error> {
    let named = || Error::host(format!("control socket {}", path.display()));
    let mut socket = UnixStream::connect(path).map_err(named())?;
    let line = serde_json::to_string(&request).unwrap_or_else(|e| unreachable!("plain data: {e}"));
    socket.write_all(format!("{line}\n").as_bytes()).map_err(named())?;
    let mut reader = BufReader::new(socket);
    let mut answer = String::new();
    reader.read_line(&mut answer).map_err(named())?;
    match serde_json::from_str(&answer).map_err(|e| named()(e.into()))? {
        Reply::Refused(why) => Err(Error::config("control", why)),
        reply => Ok((reply, reader)),
    }
}
