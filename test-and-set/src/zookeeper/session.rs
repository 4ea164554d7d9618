//! A session with one ZooKeeper server, over TCP or TLS: one request at a time.
//!
//! The requests are those that [`super::ZooKeeperStore`] needs. A session that ends is not resumed: it owns nothing, and what is
//! read in the next one is read afresh.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::jute::{JuteReader, JuteWriter};
use crate::client_keys::{ClientKeys, StoreUser};
use crate::keys::KeysError;
use crate::store::StoreError;
use crate::zookeeper_error::ZooKeeperError;

/// The longest answer; ZooKeeper's own limit is 1 MiB by default.
const ANSWER_BYTES_MAX: u32 = 16 << 20;
/// The bytes of a znode's metadata, and where its version is in them.
const STAT_BYTES: usize = 68;
const STAT_VERSION: usize = 32;
/// All permissions: read, write, create, delete, admin.
const ALL_PERMISSIONS: i32 = 31;

const CREATE: i32 = 1;
const GET_DATA: i32 = 4;
const SET_DATA: i32 = 5;
const GET_ACL: i32 = 6;
const GET_CHILDREN: i32 = 8;
const PING: i32 = 11;
const AUTH: i32 = 100;
/// Numbers of requests that ZooKeeper reserves. An answer with number -1 is an event; none is asked for.
const PING_XID: i32 = -2;
const AUTH_XID: i32 = -4;

/// How ZooKeeper calls a user in a znode's permissions. Its `auth` scheme would add the session's certificate, whose holders
/// would then need no password.
pub(super) fn owner_of(StoreUser { name, password }: &StoreUser) -> String {
    let digest = ring::digest::digest(
        &ring::digest::SHA1_FOR_LEGACY_USE_ONLY,
        format!("{name}:{password}").as_bytes(),
    );
    format!("{name}:{}", BASE64_STANDARD.encode(digest))
}

trait ZooKeeperStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ZooKeeperStream for S {}

/// A session.
pub(super) struct ZooKeeperSession {
    stream: Box<dyn ZooKeeperStream>,
    xid: i32,
}

/// The TLS of the connections, if the keys have an authority.
pub(super) fn tls(keys: &ClientKeys) -> Result<Option<TlsConnector>, StoreError> {
    let Some(authority) = keys.read_needed("ca.crt")? else { return Ok(None) };
    let pem = |source| StoreError::Keys(KeysError::Pem { path: "ca.crt, own.crt or own.key".into(), source });
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&authority) {
        roots.add(certificate.map_err(pem)?).map_err(KeysError::Tls)?;
    }
    // ZooKeeper speaks only TLS 1.2 unless it is told otherwise.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(KeysError::Tls)?
        .with_root_certificates(roots);
    let config = match keys.own()? {
        None => config.with_no_client_auth(),
        Some((certificates, key)) => {
            let chain =
                CertificateDer::pem_slice_iter(&certificates).collect::<Result<_, _>>().map_err(pem)?;
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(pem)?;
            config.with_client_auth_cert(chain, key).map_err(KeysError::Tls)?
        }
    };
    Ok(Some(Arc::new(config).into()))
}

impl ZooKeeperSession {
    /// Connects to a server, HOST:PORT, and starts a session as this user.
    pub(super) async fn start(
        server: &str,
        tls: Option<&TlsConnector>,
        user: Option<&StoreUser>,
        timeout_ms: i32,
    ) -> Result<Self, ZooKeeperError> {
        let tcp = TcpStream::connect(server).await?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn ZooKeeperStream> = match tls {
            None => Box::new(tcp),
            Some(tls) => {
                let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
                Box::new(tls.connect(name.map_err(std::io::Error::other)?, tcp).await?)
            }
        };
        let mut session = Self { stream, xid: 0 };
        let hello = JuteWriter::default().int(0).long(0).int(timeout_ms).long(0).bytes(&[0; 16]).flag(false);
        session.send(hello).await?;
        let welcome = session.receive().await?;
        let mut welcome = JuteReader(&welcome);
        welcome.skip(4, "protocol version")?;
        // A server that cannot start a session answers with no time.
        if welcome.int("timeout")? <= 0 {
            return Err(ZooKeeperError::SessionEnded);
        }
        if let Some(StoreUser { name, password }) = user {
            let login = JuteWriter::default().int(0).text("digest").text(&format!("{name}:{password}"));
            session.request(AUTH_XID, AUTH, login).await?;
        }
        Ok(session)
    }

    async fn send(&mut self, body: JuteWriter) -> Result<(), ZooKeeperError> {
        let frame = JuteWriter::default().bytes(&body.0).0;
        self.stream.write_all(&frame).await?;
        Ok(self.stream.flush().await?)
    }

    async fn receive(&mut self) -> Result<Vec<u8>, ZooKeeperError> {
        let length = self.stream.read_u32().await?;
        if length > ANSWER_BYTES_MAX {
            return Err(ZooKeeperError::Malformed("length"));
        }
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body).await?;
        Ok(body)
    }

    /// Sends a request, and returns the answer without its header.
    async fn request(&mut self, xid: i32, kind: i32, body: JuteWriter) -> Result<Vec<u8>, ZooKeeperError> {
        let head = JuteWriter::default().int(xid).int(kind);
        self.send(JuteWriter([head.0, body.0].concat())).await?;
        let answer = self.receive().await?;
        let mut reader = JuteReader(&answer);
        if reader.int("request number")? != xid {
            return Err(ZooKeeperError::Malformed("request number"));
        }
        reader.skip(8, "transaction number")?;
        match reader.int("error")? {
            0 => Ok(reader.0.to_vec()),
            code => Err(ZooKeeperError::of(code)),
        }
    }

    async fn ask(&mut self, kind: i32, body: JuteWriter) -> Result<Vec<u8>, ZooKeeperError> {
        self.xid = self.xid.checked_add(1).ok_or(ZooKeeperError::SessionEnded)?;
        self.request(self.xid, kind, body).await
    }

    /// Keeps the session alive.
    pub(super) async fn ping(&mut self) -> Result<(), ZooKeeperError> {
        self.request(PING_XID, PING, JuteWriter::default()).await.map(drop)
    }

    /// Creates a znode for a user only ([`owner_of`]), or for everybody.
    pub(super) async fn create(
        &mut self,
        path: &str,
        data: &[u8],
        owner: Option<&str>,
    ) -> Result<(), ZooKeeperError> {
        let (scheme, id) = owner.map_or(("world", "anyone"), |owner| ("digest", owner));
        let body = JuteWriter::default().text(path).bytes(data).int(1).int(ALL_PERMISSIONS);
        self.ask(CREATE, body.text(scheme).text(id).int(0)).await.map(drop)
    }

    /// The data of a znode, and its version.
    pub(super) async fn get_data(&mut self, path: &str) -> Result<(Vec<u8>, i32), ZooKeeperError> {
        let answer = self.ask(GET_DATA, JuteWriter::default().text(path).flag(false)).await?;
        let mut reader = JuteReader(&answer);
        let data = reader.bytes("data")?.to_vec();
        reader.skip(STAT_VERSION, "metadata")?;
        let version = reader.int("version")?;
        reader.skip(STAT_BYTES - STAT_VERSION - 4, "metadata")?;
        Ok((data, version))
    }

    /// Sets the data of a znode if it has this version, or any version if it is `None`.
    pub(super) async fn set_data(
        &mut self,
        path: &str,
        data: &[u8],
        version: Option<i32>,
    ) -> Result<(), ZooKeeperError> {
        let body = JuteWriter::default().text(path).bytes(data).int(version.unwrap_or(-1));
        self.ask(SET_DATA, body).await.map(drop)
    }

    /// Who may do something with a znode: schemes and names.
    pub(super) async fn get_acl(&mut self, path: &str) -> Result<Vec<(String, String)>, ZooKeeperError> {
        let answer = self.ask(GET_ACL, JuteWriter::default().text(path)).await?;
        JuteReader(&answer).list("list of permissions", |reader| {
            reader.skip(4, "permissions")?;
            Ok((reader.text("scheme")?.to_owned(), reader.text("identity")?.to_owned()))
        })
    }

    /// The names of a znode's children.
    pub(super) async fn list_children(&mut self, path: &str) -> Result<Vec<String>, ZooKeeperError> {
        let answer = self.ask(GET_CHILDREN, JuteWriter::default().text(path).flag(false)).await?;
        JuteReader(&answer).list("list of children", |reader| Ok(reader.text("name")?.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_called_as_in_zookeepers_documentation() {
        let user = StoreUser { name: "super".into(), password: "test".into() };
        assert_eq!(owner_of(&user), "super:D/InIHSb7yEEbrWz8b9l71RjZJU=");
    }
}
