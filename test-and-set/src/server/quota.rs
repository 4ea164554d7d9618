//! How many connections each certificate may have, so that none uses up a member.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;

use crate::wire::NodeId;

/// The largest number of clients that are connected at once.
const CLIENTS_MAX: usize = 512;
/// The largest number of connections of clients with one certificate.
const CLIENTS_PER_CERTIFICATE_MAX: usize = 128;
/// The largest number of connections of one member. It uses one, and has left the others behind: one more closes the oldest.
const PER_MEMBER_MAX: usize = 8;

/// As what the other side has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Party {
    /// A client.
    Client,
    /// Another member.
    Member(NodeId),
}

type OpenConnections = HashMap<(Party, Vec<u8>), VecDeque<Arc<Notify>>>;

/// The connections that are open, by certificate, from old to new.
#[derive(Default)]
pub struct ConnectionQuotas(Mutex<OpenConnections>);

/// The right to a connection, until it is dropped.
pub struct ConnectionGrant {
    quotas: Arc<ConnectionQuotas>,
    of: (Party, Vec<u8>),
    eviction: Arc<Notify>,
}

impl ConnectionQuotas {
    fn open(&self) -> MutexGuard<'_, OpenConnections> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits one more connection, or refuses it because its certificate has its share. Where there is no room for another
    /// client, the certificate with the most connections loses its oldest.
    pub fn admit(
        self: &Arc<Self>,
        certificate: &CertificateDer<'_>,
        party: Party,
    ) -> Option<ConnectionGrant> {
        let of = (party, certificate.to_vec());
        let mut open = self.open();
        let own = open.get(&of).map_or(0, VecDeque::len);
        match party {
            Party::Member(_) if own >= PER_MEMBER_MAX => evict_oldest(&mut open, &of),
            Party::Client if own >= CLIENTS_PER_CERTIFICATE_MAX => return None,
            Party::Client => {
                let clients = || open.iter().filter(|((party, _), _)| *party == Party::Client);
                if clients().map(|(_, all)| all.len()).sum::<usize>() >= CLIENTS_MAX {
                    let (most, all) = clients().max_by_key(|(_, all)| all.len())?;
                    if all.len() <= own + 1 {
                        return None;
                    }
                    let most = most.clone();
                    evict_oldest(&mut open, &most);
                }
            }
            Party::Member(_) => {}
        }
        let eviction = Arc::new(Notify::new());
        open.entry(of.clone()).or_default().push_back(eviction.clone());
        Some(ConnectionGrant { quotas: self.clone(), of, eviction })
    }
}

fn evict_oldest(open: &mut OpenConnections, of: &(Party, Vec<u8>)) {
    if let Some(oldest) = open.get_mut(of).and_then(VecDeque::pop_front) {
        oldest.notify_one();
    }
}

impl ConnectionGrant {
    /// Waits until the connection has to make room for another.
    pub async fn evicted(&self) {
        self.eviction.notified().await;
    }
}

impl Drop for ConnectionGrant {
    fn drop(&mut self) {
        let mut open = self.quotas.open();
        if let Some(all) = open.get_mut(&self.of) {
            all.retain(|one| !Arc::ptr_eq(one, &self.eviction));
            if all.is_empty() {
                open.remove(&self.of);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(number: u8) -> CertificateDer<'static> {
        vec![number].into()
    }

    fn admit_all(
        quotas: &Arc<ConnectionQuotas>,
        number: u8,
        party: Party,
        count: usize,
    ) -> Vec<ConnectionGrant> {
        (0..count).filter_map(|_| quotas.admit(&certificate(number), party)).collect()
    }

    fn is_evicted(admission: &ConnectionGrant) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let wait = async { tokio::time::timeout(std::time::Duration::ZERO, admission.evicted()).await };
        runtime.block_on(wait).is_ok()
    }

    #[test]
    fn no_certificates_keep_out_another_one() {
        let quotas = Arc::new(ConnectionQuotas::default());
        let greedy: Vec<_> = (1..=4).map(|n| admit_all(&quotas, n, Party::Client, 1000)).collect();
        assert!(greedy.iter().all(|all| all.len() == CLIENTS_PER_CERTIFICATE_MAX));
        let late = admit_all(&quotas, 5, Party::Client, 10);
        assert_eq!(late.len(), 10);
        assert_eq!(greedy.iter().flatten().filter(|one| is_evicted(one)).count(), 10);
        assert!(!late.iter().any(is_evicted));
        // Who leaves makes room.
        drop(greedy);
        assert_eq!(admit_all(&quotas, 1, Party::Client, 1000).len(), CLIENTS_PER_CERTIFICATE_MAX);
    }

    #[test]
    fn a_member_that_connects_again_loses_its_oldest_connection() {
        let quotas = Arc::new(ConnectionQuotas::default());
        let all = admit_all(&quotas, 1, Party::Member(2), PER_MEMBER_MAX + 2);
        let evicted: Vec<_> = all.iter().map(is_evicted).collect();
        assert_eq!(evicted.iter().filter(|one| **one).count(), 2);
        assert!(evicted[0] && evicted[1]);
    }
}
