//! A party's own key, which may be replaced while the party runs.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::SignatureScheme;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SigningKey};
use tracing::{info, warn};

use super::{KeysError, io_error, key_id, parse_certificates};
use crate::names::KeyId;
use crate::private_file::others_may_use;

/// What a proof signs before the connection's exported value, so that it is nothing else's signature.
pub(crate) const PROOF_PREFIX: &[u8] = b"vmft: this key replaces the one of this connection\0";
/// The signature schemes that a proof may use.
const PROOF_SCHEMES: [SignatureScheme; 4] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA256,
];

/// A party's own key and its certificate.
#[derive(Debug)]
pub struct OwnKey {
    pub(crate) certified: Arc<CertifiedKey>,
    certificate: CertificateDer<'static>,
}

impl OwnKey {
    /// The certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// A key that another process has, and signs with.
    pub(crate) fn kept(certificate: CertificateDer<'static>, key: Arc<dyn SigningKey>) -> OwnKey {
        OwnKey { certified: Arc::new(CertifiedKey::new(vec![certificate.clone()], key)), certificate }
    }

    /// What signs.
    pub(crate) fn signing_key(&self) -> &Arc<dyn SigningKey> {
        &self.certified.key
    }

    /// The key's id.
    pub fn id(&self) -> KeyId {
        key_id(&self.certificate)
    }

    /// Reads a key and its certificate, which must fit together.
    pub(super) fn read(key: &Path, certificate: &Path) -> Result<OwnKey, KeysError> {
        parse([key, certificate], &content([key, certificate])?)
    }

    /// Signs a value that was exported from a TLS connection, to show the other end that this key is the party's new one. Returns
    /// the signature scheme and the signature.
    ///
    /// # Errors
    /// The key cannot sign.
    pub fn prove(&self, exported: &[u8; 32]) -> Result<(u16, Vec<u8>), rustls::Error> {
        let signer = self.certified.key.choose_scheme(&PROOF_SCHEMES);
        let signer = signer.ok_or_else(|| rustls::Error::General("the key has no usable scheme".into()))?;
        Ok((signer.scheme().into(), signer.sign(&[PROOF_PREFIX, exported].concat())?))
    }
}

/// Checks a proof that [`OwnKey::prove`] has made.
///
/// # Errors
/// The certificate's key has not signed this value.
pub fn check_proof(
    certificate: &CertificateDer<'_>,
    scheme: u16,
    signature: &[u8],
    exported: &[u8; 32],
) -> Result<(), webpki::Error> {
    let certificate = webpki::EndEntityCert::try_from(certificate)?;
    let scheme = SignatureScheme::from(scheme);
    let message = [PROOF_PREFIX, exported].concat();
    let known = rustls::crypto::ring::default_provider().signature_verification_algorithms.mapping;
    let fitting = known.iter().filter(|(name, _)| *name == scheme && PROOF_SCHEMES.contains(name));
    let mut last = Err(webpki::Error::InvalidSignatureForPublicKey);
    for algorithm in fitting.flat_map(|(_, algorithms)| algorithms.iter()) {
        last = certificate.verify_signature(*algorithm, &message, signature);
        if last.is_ok() {
            break;
        }
    }
    last
}

/// The key in use, and the files that it comes from.
#[derive(Debug)]
pub(super) struct OwnFiles {
    pub(super) key: Arc<OwnKey>,
    /// `own.key` and `own.crt`.
    paths: [PathBuf; 2],
    /// What these files held when they were last of use.
    content: [Vec<u8>; 2],
    /// What was last said about files that are of no use.
    said: String,
}

impl OwnFiles {
    pub(super) fn load(dir: &Path) -> Result<Self, KeysError> {
        let paths = ["own.key", "own.crt"].map(|name| dir.join(name));
        let content = content([&paths[0], &paths[1]])?;
        let key = Arc::new(parse([&paths[0], &paths[1]], &content)?);
        Ok(Self { key, paths, content, said: String::new() })
    }

    /// Uses the files anew if they have changed. As long as they do not fit together, the key before stays in use.
    pub(super) fn reload(&mut self) {
        let paths = [self.paths[0].as_path(), self.paths[1].as_path()];
        let fresh = content(paths).and_then(|content| match content == self.content {
            true => Ok(None),
            false => Ok(Some((parse(paths, &content)?, content))),
        });
        match fresh {
            Ok(None) => self.said.clear(),
            Ok(Some((key, content))) => {
                if key.certificate != self.key.certificate {
                    info!("this party's key was {}, and is {} from now on", self.key.id(), key.id());
                }
                (self.key, self.content, self.said) = (Arc::new(key), content, String::new());
            }
            Err(error) => {
                let why = crate::store::chain(&error);
                if why != self.said {
                    warn!("{why}; the key that was read before, {}, stays in use", self.key.id());
                    self.said = why;
                }
            }
        }
    }
}

/// Reads a private key, which only its owner may be able to read.
pub(crate) fn read_private(path: &Path) -> Result<Vec<u8>, KeysError> {
    let mut file = fs::File::open(path).map_err(io_error(path))?;
    if others_may_use(&file).map_err(io_error(path))? {
        return Err(KeysError::Readable(path.into()));
    }
    let mut key = Vec::new();
    file.read_to_end(&mut key).map_err(io_error(path))?;
    Ok(key)
}

/// What is in the files of a key and of its certificate.
fn content(paths: [&Path; 2]) -> Result<[Vec<u8>; 2], KeysError> {
    Ok([read_private(paths[0])?, fs::read(paths[1]).map_err(io_error(paths[1]))?])
}

fn parse(paths: [&Path; 2], content: &[Vec<u8>; 2]) -> Result<OwnKey, KeysError> {
    let key = PrivateKeyDer::from_pem_slice(&content[0]);
    let key = key.map_err(|source| KeysError::Pem { path: paths[0].into(), source })?;
    let certificate = parse_certificates(paths[1], &content[1])?.swap_remove(0);
    let provider = rustls::crypto::ring::default_provider();
    let certified = CertifiedKey::from_der(vec![certificate.clone()], key, &provider)
        .map_err(|source| KeysError::Misfit { key: paths[0].into(), certificate: paths[1].into(), source })?;
    Ok(OwnKey { certified: Arc::new(certified), certificate })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::make_set;
    use super::*;

    #[test]
    fn a_private_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        make_set(dir.path(), &[], &["a".into()], &[]).unwrap();
        let a = dir.path().join("a");
        let key = a.join("own.key");
        let set = |mode| fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        let mut own = OwnFiles::load(&a).unwrap();
        for mode in [0o604, 0o640, 0o660, 0o644] {
            set(mode);
            let refused = OwnFiles::load(&a).unwrap_err();
            assert!(matches!(&refused, KeysError::Readable(path) if *path == key), "{mode:o}: {refused}");
        }
        // A process that runs keeps the key that it has, and says why.
        own.reload();
        assert!(own.said.contains("others than its owner"), "{}", own.said);
        set(0o400);
        OwnFiles::load(&a).unwrap();
    }

    #[test]
    fn a_key_is_replaced_when_both_files_fit() {
        let dir = tempfile::tempdir().unwrap();
        make_set(dir.path(), &[], &["a".into(), "b".into()], &[]).unwrap();
        let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
        let mut own = OwnFiles::load(&a).unwrap();
        let (first, second) = (own.key.id(), OwnFiles::load(&b).unwrap().key.id());
        fs::copy(b.join("own.key"), a.join("own.key")).unwrap();
        own.reload();
        assert_eq!(own.key.id(), first);
        assert!(own.said.contains("do not fit together"), "{}", own.said);
        assert!(OwnFiles::load(&a).is_err());
        fs::copy(b.join("own.crt"), a.join("own.crt")).unwrap();
        own.reload();
        assert_eq!(own.key.id(), second);
        fs::remove_file(a.join("own.key")).unwrap();
        own.reload();
        assert_eq!(own.key.id(), second);
    }

    #[test]
    fn a_proof_is_good_for_its_key_and_its_connection_only() {
        let dir = tempfile::tempdir().unwrap();
        make_set(dir.path(), &[], &["a".into(), "b".into()], &[]).unwrap();
        let [a, b] = ["a", "b"].map(|name| OwnFiles::load(&dir.path().join(name)).unwrap().key);
        let (scheme, signature) = a.prove(&[7; 32]).unwrap();
        check_proof(a.certificate(), scheme, &signature, &[7; 32]).unwrap();
        assert!(check_proof(a.certificate(), scheme, &signature, &[8; 32]).is_err());
        assert!(check_proof(b.certificate(), scheme, &signature, &[7; 32]).is_err());
        assert!(check_proof(a.certificate(), scheme + 1, &signature, &[7; 32]).is_err());
        assert!(check_proof(a.certificate(), scheme, &signature[1..], &[7; 32]).is_err());
        assert!(check_proof(&CertificateDer::from(vec![1, 2, 3]), scheme, &signature, &[7; 32]).is_err());
    }
}
