//! The control socket, over which `vmft status`, `vmft failover`, `vmft stop` and `vmft console` talk to a
//! replica.
//!
//! It is a Unix socket that only its owner may use. Each connection carries one request, which is a line of
//! JSON; the reply is a line of JSON too. After the reply to `console` the connection carries the guest's
//! console in both directions.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use serde::{Deserialize, Serialize};

use super::admission::{Admission, AdmissionTicket, TimedStream};
use super::console::{ConsolePlace, serve_client};
use super::operated::{Operated, RequestOutcome, StoreNeed};
use super::replica::Replica;
use super::report::ReplicaReport;
use crate::error::Error;
use crate::service;

/// How long a client may take to send all of its request, and to read the reply.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many clients may be sending their requests; the oldest is closed if there are more.
const REQUESTS_MAX: usize = 16;
/// The longest request, bytes.
const REQUEST_MAX: u64 = 64;

/// A request of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlRequest {
    /// Report the status.
    Status,
    /// Hand the VM over to the other side.
    Failover,
    /// End the VM's run.
    Stop,
    /// End this side: hand the VM over, or leave the pair.
    Leave,
    /// The same; and end the VM's run if this side is alone.
    LeaveOrEnd,
    /// Connect the client with the guest's console.
    Console,
}

/// The reply to a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlReply {
    /// The reply to [`ControlRequest::Status`].
    Status(Box<ReplicaReport>),
    /// The request is being carried out.
    Done,
    /// The request was carried out; the words say who runs the VM now.
    Outcome(String),
    /// The request was begun and called off, or has no outcome yet; the words say which.
    NotDone(String),
    /// The request cannot be carried out, for this reason.
    Refused(String),
}

/// The control socket of a replica. The keeper removes the socket file when this process has ended.
pub struct ControlSocket {
    listener: UnixListener,
}

impl ControlSocket {
    /// Makes the socket. Its clients wait until it is served.
    ///
    /// # Errors
    /// The socket cannot be created, or another process listens at `path`.
    pub fn create(path: &Path) -> Result<ControlSocket, Error> {
        let path_text = path.display();
        // What is no socket is never removed.
        if path.symlink_metadata().is_ok() && !is_socket(path) {
            let why = format!("{path_text} exists and is no socket; give another path");
            return Err(Error::config("control", why));
        }
        let unused = match UnixStream::connect(path) {
            Err(e) => e.kind() == io::ErrorKind::ConnectionRefused,
            Ok(_) => false,
        };
        if !unused && is_socket(path) {
            let why =
                format!("another process listens on {path_text}; stop that process or give another path");
            return Err(Error::config("control", why));
        }
        // The socket file of a process that was killed.
        if is_socket(path) {
            let failed = Error::host(format!("cannot remove the old control socket {path_text}"));
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener =
            bind(path).map_err(Error::host(format!("cannot create control socket {path_text}")))?;
        Ok(ControlSocket { listener })
    }

    /// Starts to answer requests to this side.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn serve(&self, operated: Arc<Operated>) -> Result<(), Error> {
        let failed = Error::host("cannot start the control thread");
        let listener = self.listener.try_clone().map_err(failed)?;
        let accept = move || {
            let operated = operated.clone();
            Admission::new("control", REQUESTS_MAX).accept_all(&listener, move |client, ticket| {
                serve(client, ticket, &operated)
                    .map_err(|e| format!("no complete request in {PATIENCE:?}: {e}"))
            })
        };
        service::start("control", accept)
    }
}

/// Whether there is a socket, and not a link to one.
fn is_socket(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket())
}

/// Binds a socket that only its owner may use, from its first moment on: Linux gives the file the mode of the
/// unbound socket.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener.into())
}

fn serve(mut client: UnixStream, ticket: AdmissionTicket<UnixStream>, operated: &Operated) -> io::Result<()> {
    let mut line = String::new();
    let request = TimedStream::new(client.try_clone()?, PATIENCE).take(REQUEST_MAX);
    BufReader::new(request).read_line(&mut line)?;
    let request = serde_json::from_str::<ControlRequest>(&line);
    // Only a client that has asked for something valid may stay.
    let ticket = Some(ticket).filter(|_| request.is_err());
    client.set_write_timeout(Some(PATIENCE))?;
    let replica = operated.find();
    let asker = replica.as_ref().map(Replica::asker);
    let (reply, console) = match (request, replica) {
        (Err(e), _) => (ControlReply::Refused(format!("{line:?} is not a request: {e}")), None),
        (Ok(ControlRequest::Status), _) => (ControlReply::Status(operated.report().into()), None),
        (Ok(ControlRequest::Failover), _) => (operated.hand_over(StoreNeed::Required).into(), None),
        (Ok(ControlRequest::Stop), _) => (operated.stop().into(), None),
        (Ok(ControlRequest::Leave), _) => (operated.leave(StoreNeed::Required, false).into(), None),
        (Ok(ControlRequest::LeaveOrEnd), _) => (operated.leave(StoreNeed::Wanted, true).into(), None),
        (Ok(ControlRequest::Console), None) => {
            let why = "this backup is waiting for a primary, and has no guest yet";
            (ControlReply::Refused(why.into()), None)
        }
        (Ok(ControlRequest::Console), Some(replica)) => match ConsolePlace::take() {
            Some(place) => (ControlReply::Done, Some((replica, place))),
            None => (ControlReply::Refused("too many clients are connected with the console".into()), None),
        },
    };
    let mut answer = serde_json::to_vec(&reply)?;
    answer.push(b'\n');
    client.write_all(&answer)?;
    drop((ticket, asker));
    match console {
        Some((replica, _place)) => serve_client(&replica, client),
        None => Ok(()),
    }
}

impl From<RequestOutcome> for ControlReply {
    fn from(answer: RequestOutcome) -> ControlReply {
        match answer {
            RequestOutcome::Done(words) => ControlReply::Outcome(words),
            RequestOutcome::Refused(why) => ControlReply::Refused(why),
            RequestOutcome::NotDone(why) => ControlReply::NotDone(why),
        }
    }
}

/// Sends a request to the replica that listens on a socket. Returns its reply, and the socket for what
/// follows the reply.
///
/// # Errors
/// No replica listens there, or it refuses.
pub fn ask(path: &Path, request: ControlRequest) -> Result<(ControlReply, BufReader<UnixStream>), Error> {
    let unconnected = || format!("cannot connect to control socket {}", path.display());
    let failed = || Error::host(format!("no reply on control socket {}", path.display()));
    let mut socket = UnixStream::connect(path).map_err(Error::host(unconnected()))?;
    let line = serde_json::to_string(&request).unwrap_or_else(|e| unreachable!("plain data: {e}"));
    socket.write_all(format!("{line}\n").as_bytes()).map_err(failed())?;
    let mut reader = BufReader::new(socket);
    let mut answer = String::new();
    reader.read_line(&mut answer).map_err(failed())?;
    match serde_json::from_str(&answer).map_err(|e| failed()(e.into()))? {
        ControlReply::Refused(why) => Err(Error::config("control", why)),
        reply => Ok((reply, reader)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_nobody_uses_is_replaced_or_removed() {
        let dir = std::env::temp_dir().join(format!("vmft-control-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let refusal = |path: &Path| match ControlSocket::create(path) {
            Err(Error::Config { field, why }) if field == "control" => why,
            Err(e) => panic!("{e}"),
            Ok(_) => panic!("replaced"),
        };
        let (file, link, socket) = (dir.join("file"), dir.join("link"), dir.join("socket"));
        std::fs::write(&file, "precious").unwrap();
        drop(UnixListener::bind(&socket).unwrap());
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        for path in [&file, &link, &dir] {
            assert!(refusal(path).contains("is no socket"));
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        let control = ControlSocket::create(&socket).unwrap();
        assert!(refusal(&socket).contains("another process listens"));
        // What has taken the socket's place stays.
        std::fs::rename(&file, &socket).unwrap();
        drop(control);
        assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
        // So does a socket of another kind.
        let datagram = std::os::unix::net::UnixDatagram::bind(dir.join("datagram")).unwrap();
        assert!(refusal(&dir.join("datagram")).contains("another process"));
        drop(datagram);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
