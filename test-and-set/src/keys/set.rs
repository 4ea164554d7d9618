//! Makes the keys of all parties at one place, for trials and tests.

use std::collections::BTreeMap;
use std::path::Path;

use rcgen::{CertifiedKey, KeyPair};

use super::KeysError;
use super::manage::{make_pair, write_new};
use crate::wire::NodeId;

/// A party of the set, and the directories in which others keep its certificate.
struct SetParty {
    is_member: bool,
    is_host: bool,
    is_operator: bool,
    pair: CertifiedKey<KeyPair>,
}

/// Makes keys: in `dir` one directory for each member, named by its number, and one for each host and operator, each complete and
/// ready to be copied to its host. All hosts accept each other as peers. A name may be a host's and an operator's: they share one
/// key.
///
/// # Errors
/// A file exists already or cannot be written, or a name is not valid.
pub fn make_set(
    dir: &Path,
    members: &[NodeId],
    hosts: &[String],
    operators: &[String],
) -> Result<(), KeysError> {
    let members: Vec<_> = members.iter().map(NodeId::to_string).collect();
    let mut made = BTreeMap::new();
    for name in members.iter().chain(hosts).chain(operators) {
        let is_in = |list: &[String]| list.contains(name);
        let (is_member, is_host, is_operator) = (is_in(&members), is_in(hosts), is_in(operators));
        let party = SetParty { is_member, is_host, is_operator, pair: make_pair(name)? };
        made.insert(name, party);
    }
    for (name, party) in &made {
        let own = dir.join(name);
        write_new(&own.join("own.key"), &party.pair.signing_key.serialize_pem(), 0o600)?;
        write_new(&own.join("own.crt"), &party.pair.cert.pem(), 0o644)?;
        for (other, accepted) in &made {
            let kinds = [
                ("members", accepted.is_member),
                ("hosts", party.is_member && accepted.is_host),
                ("operators", party.is_member && accepted.is_operator),
                ("peers", party.is_host && accepted.is_host && other != name),
            ];
            for (kind, _) in kinds.iter().filter(|(_, applies)| *applies) {
                write_new(&own.join(kind).join(format!("{other}.crt")), &accepted.pair.cert.pem(), 0o644)?;
            }
        }
    }
    Ok(())
}
