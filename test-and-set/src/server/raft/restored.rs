//! The data of a new cluster's only member, whose state is from a backup.

use std::collections::BTreeMap;

use openraft::{BasicNode, CommittedLeaderId, LogId, Membership, Vote};

use super::types::{RaftMembership, RaftSnapshotMeta, encode};
use crate::server::disk::MemberDisk;
use crate::server::disk_error::DiskError;
use crate::state::StoreState;
use crate::wire::NodeId;

/// Stores a state as the snapshot of a cluster of which this member, at this address, is the only one.
pub fn store_first_snapshot(
    disk: &MemberDisk,
    (id, address): (NodeId, &str),
    state: &StoreState,
) -> Result<(), DiskError> {
    let last = Some(LogId::new(CommittedLeaderId::new(1, id), 1));
    let nodes: BTreeMap<_, _> = [(id, BasicNode::new(address))].into();
    let members = Membership::new(vec![[id].into()], nodes);
    let meta = RaftSnapshotMeta {
        last_log_id: last,
        last_membership: RaftMembership::new(last, members),
        snapshot_id: "restored".into(),
    };
    disk.put("vote", &encode(&Vote::<NodeId>::new(1, id))?)?;
    disk.put_snapshot(&encode(&meta)?, &encode(state)?)
}
