//! Keys that another process has.

use std::fmt::Debug;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;

use super::OwnKey;
use crate::names::PartyName;

/// What another process says about a host's keys.
pub trait KeyKeeper: Debug + Send + Sync {
    /// The host's own key, which that process signs with; the one before, if it does not answer.
    fn own(&self) -> Arc<OwnKey>;

    /// The name of the peer that has this certificate; `None` also if that process does not answer.
    fn peer(&self, certificate: &CertificateDer<'_>) -> Option<PartyName>;

    /// Whether that process has ended.
    fn is_lost(&self) -> bool;
}
