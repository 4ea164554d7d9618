//! TLS 1.3 in which both sides check the other's certificate against the pinned ones of [`crate::keys`].

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    ServerConfig, SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::keys::{Keys, KeysError};

/// Decides whether a certificate is accepted.
type AcceptRule = fn(&Keys, &CertificateDer<'_>) -> bool;

#[derive(Debug)]
struct PinnedVerifier {
    keys: Arc<Keys>,
    accepts: AcceptRule,
    provider: Arc<CryptoProvider>,
}

impl PinnedVerifier {
    fn new(keys: &Arc<Keys>, accepts: AcceptRule) -> Arc<PinnedVerifier> {
        let mut provider = rustls::crypto::ring::default_provider();
        // The log is bulk data, and AES-128-GCM is the fastest cipher.
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        Arc::new(PinnedVerifier { keys: keys.clone(), accepts, provider: provider.into() })
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        if (self.accepts)(&self.keys, certificate) {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The error for TLS 1.2, which is never negotiated.
fn no_tls12() -> Error {
    Error::General("TLS 1.2 is not used".into())
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for PinnedVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// The key that a party has at the moment of a handshake.
#[derive(Debug)]
struct CurrentKey(Arc<Keys>);

impl ResolvesServerCert for CurrentKey {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.own().certified.clone())
    }
}

impl ResolvesClientCert for CurrentKey {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.own().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// For the side that connects to a member of the store: accepts members only.
pub fn connector(keys: &Arc<Keys>) -> Result<TlsConnector, KeysError> {
    Ok(client(keys, Keys::is_member)?.into())
}

/// For a member of the store, which listens: accepts members and clients.
pub fn acceptor(keys: &Arc<Keys>) -> Result<TlsAcceptor, KeysError> {
    Ok(server(keys, Keys::is_known)?.into())
}

/// For the host that connects to the other host of its pair: accepts peers only, and this host's own certificate, which the
/// caller has to refuse.
pub fn peer_client(keys: &Arc<Keys>) -> Result<Arc<ClientConfig>, KeysError> {
    client(keys, Keys::is_peer_or_own)
}

/// For the host that listens for the other host of its pair: accepts peers only, and this host's own certificate, which the
/// caller has to refuse.
pub fn peer_server(keys: &Arc<Keys>) -> Result<Arc<ServerConfig>, KeysError> {
    server(keys, Keys::is_peer_or_own)
}

/// Neither this side nor [`server`] resumes sessions: a resumed session would not check the certificate again.
fn client(keys: &Arc<Keys>, accepts: AcceptRule) -> Result<Arc<ClientConfig>, KeysError> {
    let pinned = PinnedVerifier::new(keys, accepts);
    let mut config = ClientConfig::builder_with_provider(pinned.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_client_cert_resolver(Arc::new(CurrentKey(keys.clone())));
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

fn server(keys: &Arc<Keys>, accepts: AcceptRule) -> Result<Arc<ServerConfig>, KeysError> {
    let pinned = PinnedVerifier::new(keys, accepts);
    let mut config = ServerConfig::builder_with_provider(pinned.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(pinned)
        .with_cert_resolver(Arc::new(CurrentKey(keys.clone())));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
