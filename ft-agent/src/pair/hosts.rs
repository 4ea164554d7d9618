//! On which hosts a VM may run, by the store's record of it.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use test_and_set::blocking::BlockingStore;
use test_and_set::keys::key_id;
use test_and_set::record::{HostId, Member, Refusal, VmPhase, VmRecord};
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

/// Which hosts run the VM, by the store's record: `on host b, alone`.
pub fn running(record: &VmRecord) -> String {
    let name = |member: &Member| match &member.host {
        Some(HostId::Name(name)) => format!("host {name}"),
        Some(HostId::Key(key)) => format!("a host without a name (key {key})"),
        None => format!("a host that the store cannot name (replica {})", member.incarnation),
    };
    match &record.phase {
        VmPhase::Open { members, holder: Some(holder) } => {
            let holder = members.find(*holder).map_or(format!("replica {holder}"), name);
            format!("on {holder}, alone")
        }
        VmPhase::Open { members, holder: None } => match &members.backup {
            Some(backup) => format!("on {} and {}", name(&members.primary), name(backup)),
            None => format!("on {}", name(&members.primary)),
        },
        VmPhase::Forgotten => "nowhere".into(),
    }
}
