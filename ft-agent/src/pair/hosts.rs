//! On which hosts a VM may run, by the store's record of it.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use test_and_set::blocking::BlockingStore;
use test_and_set::keys::key_id;
use test_and_set::record::{Refusal, VmRecord};
use test_and_set::store::StoreError;

/// Why the host with this certificate may not run the VM; `None` if it may, as any host may run a VM that is
/// bound to none.
///
/// # Errors
/// The store does not answer.
pub fn refusal(
    store: &BlockingStore,
    record: Option<&VmRecord>,
    certificate: &CertificateDer<'_>,
    patience: Duration,
) -> Result<Option<Refusal>, StoreError> {
    let Some(record) = record.filter(|record| !record.hosts.is_empty()) else { return Ok(None) };
    let host = store.host_of(key_id(certificate), patience)?;
    let may = host.is_some_and(|host| record.hosts.contains(&host));
    Ok((!may).then(|| Refusal::Bound(record.hosts.clone())))
}
