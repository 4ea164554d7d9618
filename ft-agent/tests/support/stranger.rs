//! Strangers: they call a backup with the keys of some party.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent::{Hello, Role};
use entry::PositionUnit;
use entry::identity::Identity;
use logging_channel::message::{Message, encode};
use logging_channel::versions::{ChannelVersions, OURS};
use rustls::{ClientConnection, StreamOwned};
use test_and_set::keys::Keys;
use test_and_set::tls::peer_client;

/// Where the backup of a site listens for its primary.
pub const BACKUP: &str = "10.78.0.2:7500";

/// A TLS connection to the backup, with these keys.
pub fn call(keys: &Path) -> std::io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let keys = Arc::new(Keys::load(keys).expect("keys"));
    let mut tcp = TcpStream::connect(BACKUP)?;
    tcp.set_read_timeout(Some(Duration::from_secs(4)))?;
    let name = "vmft".try_into().expect("name");
    let mut tls = ClientConnection::new(peer_client(&keys).expect("TLS"), name).expect("TLS");
    while tls.is_handshaking() || tls.wants_write() {
        tls.complete_io(&mut tcp)?;
    }
    Ok(StreamOwned::new(tls, tcp))
}

/// Claims to be the VM's primary, with a new incarnation. Returns once the backup has closed the connection.
pub fn claim(keys: &Path, incarnation: u128) -> std::io::Result<()> {
    say_hello(keys, incarnation, OURS).map(drop)
}

/// Says hello to the backup as the VM's primary. Returns what the backup said before it closed the connection.
pub fn say_hello(keys: &Path, incarnation: u128, versions: ChannelVersions) -> std::io::Result<Vec<u8>> {
    let mut stream = call(keys)?;
    let mut hello = Vec::new();
    let content = Hello {
        versions,
        vm: "vm".into(),
        role: Role::Primary,
        incarnation,
        disks: Default::default(),
        timeout_ns: 1_000_000_000,
        buffer_bytes: 1 << 20,
        identity: Identity::new(PositionUnit::Instructions),
    };
    encode(OURS.oldest, &Message::Hello(Box::new(content)), &mut hello);
    stream.write_all(&hello)?;
    let mut said = Vec::new();
    // However the connection ends, what came before it counts.
    stream.read_to_end(&mut said).ok();
    Ok(said)
}
