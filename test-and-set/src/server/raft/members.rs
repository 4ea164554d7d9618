//! Changes of the members. No change takes the quorum: a new member votes when it has the log, and a member with a vote is
//! removed only if a majority of the others answers.

use std::time::{Duration, Instant};

use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers};
use tracing::error;

use super::Raft;
use super::types::RaftWriteError;
use crate::server::peers::OtherMember;
use crate::wire::{NodeId, RequestFailure};

/// How long a new member may take to answer for the first time; it may just be starting.
const FIRST_ANSWER_PATIENCE: Duration = Duration::from_secs(4);
/// How long a new member may take to get the log.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(60);
/// How long one change of the members may take.
const MEMBERS_PATIENCE: Duration = Duration::from_secs(20);
/// The pause before a change or a question is tried again.
const MEMBERS_PAUSE: Duration = Duration::from_millis(50);

/// A member as the current configuration has it.
struct ConfiguredMember {
    id: NodeId,
    address: String,
    votes: bool,
}

fn refused(why: String) -> RequestFailure {
    RequestFailure::Members(why)
}

impl Raft {
    /// Adds a member: as a learner until it has all of the log, then with a vote. If it does not get there, it is removed again.
    pub async fn add_member(&self, id: NodeId, address: String) -> Result<(), RequestFailure> {
        self.check_leads()?;
        let known = self.configured().into_iter().find(|member| member.id == id);
        let is_new = known.is_none();
        if let Some(known) = known.filter(|known| known.address != address || known.votes) {
            return match known.address == address {
                true => Ok(()),
                false => Err(refused(format!(
                    "member {id} is at {}; remove it before you add it at {address}",
                    known.address
                ))),
            };
        }
        // Before its data was emptied, a removed member that still ran may have connected once more.
        if is_new && let Err(error) = self.peers.forget(id) {
            error!("cannot forget the data of member {id}: {error}");
        }
        self.wait_for_first_answer(id, &address).await?;
        let node = BasicNode::new(&address);
        self.change_members(|| self.raft.add_learner(id, node.clone(), false)).await?;
        if let Err(failure) = self.wait_until_caught_up(id, &address).await {
            let removal = ChangeMembers::RemoveNodes([id].into());
            if let Err(error) =
                self.change_members(|| self.raft.change_membership(removal.clone(), false)).await
            {
                error!("cannot remove member {id}, which was not added completely: {error}");
            }
            error!("{failure}");
            return Err(failure);
        }
        let vote = ChangeMembers::AddVoterIds([id].into());
        self.change_members(|| self.raft.change_membership(vote.clone(), false)).await
    }

    /// Removes a member.
    pub async fn remove_member(&self, id: NodeId) -> Result<(), RequestFailure> {
        self.check_leads()?;
        let members = self.configured();
        let Some(removed) = members.iter().find(|member| member.id == id) else {
            return Err(refused(format!("there is no member {id}")));
        };
        let change = match removed.votes {
            true => ChangeMembers::RemoveVoters([id].into()),
            false => ChangeMembers::RemoveNodes([id].into()),
        };
        if removed.votes {
            self.check_quorum_of(members.iter().filter(|member| member.votes && member.id != id)).await?;
        }
        self.change_members(|| self.raft.change_membership(change.clone(), false)).await
    }

    /// Connects to all other members, each of which tells what it remembers of this one, or does not answer within the patience of a
    /// connection.
    pub async fn reach_others(&self) {
        let me = self.raft.metrics().borrow().id;
        let others = self.configured().into_iter().filter(|member| member.id != me);
        let mut asked = tokio::task::JoinSet::new();
        for other in others {
            let (peers, peer) = (self.peers.clone(), self.peers.get(other.id, &other.address));
            // A member that does not answer is asked again with the first message to it.
            asked.spawn(async move { drop(peers.reach(&peer).await) });
        }
        asked.join_all().await;
    }

    fn check_leads(&self) -> Result<(), RequestFailure> {
        let (me, leader) = (self.raft.metrics().borrow().id, self.leader());
        match leader {
            Some((leader, _)) if leader == me => Ok(()),
            leader => Err(RequestFailure::NotLeader(leader.map(|(_, address)| address))),
        }
    }

    fn configured(&self) -> Vec<ConfiguredMember> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let config = metrics.membership_config.membership();
        let member = |(id, node): (&NodeId, &BasicNode)| ConfiguredMember {
            id: *id,
            address: node.addr.clone(),
            votes: config.voter_ids().any(|voter| voter == *id),
        };
        config.nodes().map(member).collect()
    }

    /// Waits until a member answers that is not in the configuration yet.
    async fn wait_for_first_answer(&self, id: NodeId, address: &str) -> Result<(), RequestFailure> {
        let (begun, peer) = (Instant::now(), self.peers.get(id, address));
        loop {
            let Err(error) = self.peers.reach(&peer).await else { return Ok(()) };
            if begun.elapsed() > FIRST_ANSWER_PATIENCE {
                if self.configured().iter().all(|member| member.id != id)
                    && let Err(error) = self.peers.forget(id)
                {
                    error!("cannot forget the data of member {id}, which was not added: {error}");
                }
                return Err(refused(format!(
                    "member {id} does not answer at {address}: {error}; the members are as before"
                )));
            }
            tokio::time::sleep(MEMBERS_PAUSE).await;
        }
    }

    /// Waits until a learner has all of the log.
    async fn wait_until_caught_up(&self, id: NodeId, address: &str) -> Result<(), RequestFailure> {
        let begun = Instant::now();
        let mut metrics = self.raft.metrics();
        // In the second round the learner gets what was appended during the first one.
        for _ in 0..2 {
            let wanted = metrics.borrow_and_update().last_log_index;
            loop {
                self.check_leads()?;
                let replication = metrics.borrow_and_update().replication.clone();
                let has = replication.and_then(|all| *all.get(&id)?).map(|log_id| log_id.index);
                if has >= wanted {
                    break;
                }
                if begun.elapsed() > CATCH_UP_PATIENCE {
                    let (has, wanted) = (has.unwrap_or(0), wanted.unwrap_or(0));
                    return Err(refused(format!(
                        "member {id} at {address} has entries up to {has} of {wanted} after {CATCH_UP_PATIENCE:?}; it was \
                         removed again and has no vote"
                    )));
                }
                tokio::time::timeout(MEMBERS_PAUSE, metrics.changed()).await.ok();
            }
        }
        Ok(())
    }

    /// Refuses a removal after which there would be no majority that answers.
    async fn check_quorum_of(
        &self,
        remaining: impl Iterator<Item = &ConfiguredMember>,
    ) -> Result<(), RequestFailure> {
        let me = self.raft.metrics().borrow().id;
        let (mut all, mut silent) = (0, vec![]);
        for member in remaining {
            all += 1;
            let peer = self.peers.get(member.id, &member.address);
            if member.id != me && !self.answers(&peer).await {
                silent.push(member.id.to_string());
            }
        }
        if all == 0 {
            return Err(refused("it is the last member with a vote".into()));
        }
        let answer = all - silent.len();
        if answer > all / 2 {
            return Ok(());
        }
        Err(refused(format!(
            "of the {all} members that would remain, {answer} would answer, which is no majority; member {} does not answer: \
             start it, or remove it first",
            silent.join(", ")
        )))
    }

    /// Whether a member is heard from within the time after which a leader is suspected: each answers the leader's heartbeats.
    async fn answers(&self, peer: &OtherMember) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < self.suspicion {
            if self.peers.reach(peer).await.is_ok_and(|heard| heard > begun) {
                return true;
            }
            tokio::time::sleep(MEMBERS_PAUSE / 5).await;
        }
        false
    }

    /// Makes a change of members, and waits for an earlier one whose last entry is not committed yet.
    async fn change_members<T, F>(&self, change: impl Fn() -> F) -> Result<(), RequestFailure>
    where
        F: Future<Output = Result<T, RaftWriteError>>,
    {
        let in_its_turn = async {
            loop {
                match change().await {
                    Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                        ChangeMembershipError::InProgress(_),
                    ))) => tokio::time::sleep(MEMBERS_PAUSE).await,
                    done => break done,
                }
            }
        };
        match tokio::time::timeout(MEMBERS_PATIENCE, in_its_turn).await {
            Err(_) => Err(refused(format!(
                "the change did not complete within {MEMBERS_PATIENCE:?}, but may still do so; see `vmft-store status`"
            ))),
            Ok(changed) => changed.map(drop).map_err(|e| self.write_failure(e)),
        }
    }
}
