//! Tells of elections, of changes of the members, and of a full disk.

use std::time::Duration;

use tracing::{info, warn};

use super::Raft;
use crate::wire::NodeId;

/// Time between two lines: an election that is repeated again and again fills no log. What holds in the end is told.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often the disk is looked at.
const DISK_INTERVAL: Duration = Duration::from_secs(5);

/// What was told.
#[derive(Default)]
struct Told {
    leader: Option<NodeId>,
    term: u64,
    members: String,
    is_full: bool,
}

impl Raft {
    /// Tells of changes, for ever.
    pub async fn tell_changes(self) {
        let mut changes = self.raft.server_metrics();
        let mut told = Told::default();
        loop {
            self.tell(&mut told);
            tokio::time::sleep(INTERVAL).await;
            // The disk is looked at even if nothing changes.
            if let Ok(Err(_)) = tokio::time::timeout(DISK_INTERVAL, changes.changed()).await {
                return;
            }
        }
    }

    fn tell(&self, told: &mut Told) {
        let view = self.view();
        if (view.leader, view.term) != (told.leader, told.term) {
            match (view.leader, told.leader) {
                (Some(leader), _) => {
                    info!("member {leader} leads in term {}; this one is {}", view.term, view.role)
                }
                (None, Some(before)) => warn!(
                    "member {before} no longer leads, and no other does yet; this one is {} in term {}",
                    view.role, view.term
                ),
                // Told already, or nobody has led since the start.
                (None, None) => {}
            }
            (told.leader, told.term) = (view.leader, view.term);
        }
        let members = view.members.iter().map(|(id, member)| {
            format!("{id} at {}{}", member.address, if member.votes { "" } else { " (does not vote)" })
        });
        let members = members.collect::<Vec<_>>().join(", ");
        if members != told.members {
            info!("the members are {members}");
            told.members = members;
        }
        let is_full = self.disk.is_full();
        if is_full != std::mem::replace(&mut told.is_full, is_full) {
            match is_full {
                true => warn!("the disk is FULL: this member takes no commands until some of it is free"),
                false => info!("the disk is no longer full"),
            }
        }
    }
}
