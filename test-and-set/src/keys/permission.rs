//! What the other end of an open connection was accepted as, and the end of that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustls::pki_types::CertificateDer;

use super::{Keys, Roles};

/// How often an open connection's certificate is looked up.
const INTERVAL: Duration = Duration::from_millis(500);

/// As what the other end of a connection was accepted when it connected. The connection lasts no longer than that.
#[derive(Debug)]
pub struct Permission {
    keys: Arc<Keys>,
    certificate: CertificateDer<'static>,
    roles: Roles,
    /// The revision of the keys with which it last held: it is asked for with every message, and is looked up in others only.
    held_in: AtomicU64,
}

impl Permission {
    /// The permission of a connection on which the other end has shown this certificate.
    pub fn new(keys: &Arc<Keys>, certificate: &CertificateDer<'_>) -> Self {
        // A revision that comes between the two is looked up once more.
        let (revision, roles) = (keys.revision(), keys.roles(certificate));
        let certificate = certificate.clone().into_owned();
        Self { keys: keys.clone(), certificate, roles, held_in: revision.into() }
    }

    /// The certificate of the other end.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// As what the other end was accepted.
    pub fn roles(&self) -> &Roles {
        &self.roles
    }

    /// Whether the certificate is still accepted, and as the same.
    pub fn holds(&self) -> bool {
        if self.roles == Roles::default() {
            return false;
        }
        let revision = self.keys.revision();
        if self.held_in.load(Relaxed) == revision {
            return true;
        }
        let holds = self.keys.roles(&self.certificate) == self.roles;
        if holds {
            self.held_in.store(revision, Relaxed);
        }
        holds
    }

    /// Waits until it does not hold any more.
    pub async fn ended(&self) {
        while self.holds() {
            tokio::time::sleep(INTERVAL).await;
        }
    }
}
