//! The keys by which the two ends of a link know each other. The handshake has shown them; a key that is replaced later is
//! shown on the link itself, so that a replacement costs no failover.

use std::sync::Arc;

use agent::{KeyProof, Role};
use logging_channel::message::CERTIFICATE_MAX;
use rustls::pki_types::CertificateDer;
use test_and_set::keys::{Keys, OwnKey, check_proof, key_id};
use test_and_set::names::PartyName;
use tracing::{info, warn};

/// The keys of a link's two ends.
#[derive(Clone, Debug)]
pub struct LinkKeys {
    /// The certificate that this side has shown to the peer.
    own: CertificateDer<'static>,
    /// The certificate that the peer has shown and by which it is accepted.
    peer: CertificateDer<'static>,
    /// The peer's name: that of the file in `peers/` with its certificate.
    name: PartyName,
    /// The peer's new certificate, which it has shown, but by which it is not accepted yet.
    next: Option<CertificateDer<'static>>,
    /// What the peer has sent to show its new certificate, until it is checked.
    proof: Option<KeyProof>,
}

/// What there is to check about a link's keys, taken from it so that it is not locked meanwhile.
pub struct KeyCheck {
    keys: LinkKeys,
    /// What the peer's proof has to sign.
    peer_exported: Option<[u8; 32]>,
    /// This side's key, if the peer does not know it, and what a proof of it has to sign.
    unshown: Option<(Arc<OwnKey>, [u8; 32])>,
}

/// What is known after a check.
pub struct CheckedKeys {
    /// The keys of the link from now on.
    pub keys: LinkKeys,
    /// Whether the peer's certificate is still accepted.
    pub accepted: bool,
    /// What is to be sent to the peer, so that it knows this side's new key.
    pub proof: Option<KeyProof>,
}

impl LinkKeys {
    /// The keys that the handshake has shown. `None`: the peer's certificate is not accepted.
    pub fn new(keys: &Keys, own: &OwnKey, peer: CertificateDer<'static>) -> Option<LinkKeys> {
        let name = keys.peer(&peer)?;
        Some(LinkKeys { own: own.certificate().clone(), peer, name, next: None, proof: None })
    }

    /// The certificate by which the peer is known.
    pub fn peer(&self) -> &CertificateDer<'static> {
        &self.peer
    }

    /// The peer has sent a proof of a new key. It replaces one that is not checked yet.
    pub fn proof_received(&mut self, proof: KeyProof) {
        self.proof = Some(proof);
    }

    /// Begins a check of a link whose near end has this role. `export` exports what the side with a role has to sign to show a
    /// certificate's key.
    pub fn begin_check(
        &mut self,
        role: Role,
        own: &Arc<OwnKey>,
        export: impl Fn(Role, &CertificateDer<'_>) -> Option<[u8; 32]>,
    ) -> KeyCheck {
        let other = match role {
            Role::Primary => Role::Backup,
            Role::Backup => Role::Primary,
        };
        let proof = self.proof.take();
        let peer_exported =
            proof.as_ref().and_then(|proof| export(other, &CertificateDer::from(&proof.certificate[..])));
        let is_unshown = self.own != *own.certificate();
        let own_exported = is_unshown.then(|| export(role, own.certificate())).flatten();
        let unshown = own_exported.map(|exported| (own.clone(), exported));
        KeyCheck { keys: LinkKeys { proof, ..self.clone() }, peer_exported, unshown }
    }

    /// The keys after a check, with what has arrived meanwhile.
    pub fn checked(&mut self, checked: LinkKeys) {
        *self = LinkKeys { proof: self.proof.take(), ..checked };
    }
}

impl KeyCheck {
    /// Checks the keys. This may read files.
    pub fn run(self, accepted: &Keys) -> CheckedKeys {
        let KeyCheck { mut keys, peer_exported, unshown } = self;
        if let (Some(proof), Some(exported)) = (keys.proof.take(), peer_exported) {
            keys.check_peer(accepted, &proof, &exported);
        }
        keys.know_by_next(accepted);
        let name = accepted.peer(&keys.peer);
        let is_accepted = name.is_some();
        keys.name = name.unwrap_or(keys.name);
        let proof = unshown.and_then(|(own, exported)| {
            keys.own = own.certificate().clone();
            prove(&own, &exported)
        });
        CheckedKeys { keys, accepted: is_accepted, proof }
    }
}

impl LinkKeys {
    fn check_peer(&mut self, accepted: &Keys, proof: &KeyProof, exported: &[u8; 32]) {
        let (peer, certificate) = (&self.name, CertificateDer::from(proof.certificate.clone()));
        if let Err(e) = check_proof(&certificate, proof.scheme, &proof.signature, exported) {
            return warn!(%peer, "the peer has not shown that its new key is its own, so it is known by the old one: {e}");
        }
        let key = key_id(&certificate);
        if certificate == *accepted.own().certificate() {
            return warn!(%peer, %key, "the peer's new key is this host's own; give each host keys of its own");
        }
        if certificate == self.peer {
            return;
        }
        if accepted.peer(&certificate).as_ref() != Some(peer) {
            warn!(
                %peer, %key,
                "the peer has a new key, which is not in peers/{peer}.crt: add its certificate there before the old one \
                 is removed"
            );
        }
        self.next = Some(certificate);
    }

    /// Knows the peer by its new certificate, once that is accepted as the same host's.
    fn know_by_next(&mut self, accepted: &Keys) {
        let is_accepted = |next: &CertificateDer<'_>| accepted.peer(next).as_ref() == Some(&self.name);
        if let Some(next) = self.next.take_if(|next| is_accepted(next)) {
            info!(peer = %self.name, key = %key_id(&next), "the peer has replaced its key, and is known by the new one");
            self.peer = next;
        }
    }
}

/// A proof that this side has this key. `None`: it cannot be proven, and the peer goes on to know the old one.
fn prove(own: &OwnKey, exported: &[u8; 32]) -> Option<KeyProof> {
    let (key, certificate) = (own.id(), own.certificate().to_vec());
    if certificate.len() > CERTIFICATE_MAX {
        let length = certificate.len();
        warn!(%key, length, "own.crt is longer than {CERTIFICATE_MAX} bytes, so the peer knows this host by the old key");
        return None;
    }
    match own.prove(exported) {
        Ok((scheme, signature)) => {
            info!(%key, "this host's key was replaced, and the peer is shown the new one");
            Some(KeyProof { certificate, scheme, signature })
        }
        Err(e) => {
            warn!(%key, "the peer cannot be shown this host's new key, and knows it by the old one: {e}");
            None
        }
    }
}
