//! What the other end of an open connection was accepted as, and the end of that.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;

use super::{Keys, Roles};

/// How often an open connection's certificate is looked up.
const INTERVAL: Duration = Duration::from_millis(500);

/// As what the other end of a connection was accepted when it connected. The connection lasts no longer than that.
#[derive(Debug, Clone)]
pub struct Permission {
    keys: Arc<Keys>,
    certificate: CertificateDer<'static>,
    roles: Roles,
}

impl Permission {
    /// The permission of a connection on which the other end has shown this certificate.
    pub fn new(keys: &Arc<Keys>, certificate: &CertificateDer<'_>) -> Self {
        let roles = keys.roles(certificate);
        Self { keys: keys.clone(), certificate: certificate.clone().into_owned(), roles }
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
        self.roles != Roles::default() && self.keys.roles(&self.certificate) == self.roles
    }

    /// Waits until it does not hold any more.
    pub async fn ended(&self) {
        while self.holds() {
            tokio::time::sleep(INTERVAL).await;
        }
    }
}
