//! The connections from this member to the others, and the check that each side has what the other one remembers of it.
//!
//! A member that comes with another data directory has lost its log and its vote, and one that lacks what it has acknowledged has
//! lost some of them: it could vote twice in a term, or deny what it has acknowledged. So both sides of a connection check their
//! greetings before any other message, and each checks itself: what the other one remembers must be in its own data.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex as AsyncMutex, watch};
use tracing::error;

use crate::connection::{ConnectionError, Dialer, NodeConnection};
use crate::server::absence::Absence;
use crate::server::disk::MemberDisk;
use crate::server::disk_error::DiskError;
use crate::server::left_out::is_left_out;
use crate::wire::{
    ConnectionRefusal, DataMark, MemberHello, NodeId, PeerAnswer, PeerAsk, PeerRequest, PeerResponse,
};

/// A connection on which a request has no answer and nothing was received for this long is replaced.
const SILENCE_MAX: Duration = Duration::from_millis(300);
const CONNECT_PATIENCE: Duration = Duration::from_millis(300);

/// All other members.
pub struct OtherMembers {
    me: NodeId,
    disk: Arc<MemberDisk>,
    dialer: Option<Dialer>,
    all: Mutex<BTreeMap<NodeId, Arc<OtherMember>>>,
    /// Why this member's data must not be used any more.
    rolled_back: watch::Sender<Option<String>>,
    /// Whether the others that can be reached have been asked what they remember of this member.
    has_asked: watch::Sender<bool>,
}

/// One other member.
pub struct OtherMember {
    to: NodeId,
    address: String,
    link: AsyncMutex<Option<Arc<NodeConnection>>>,
    absence: Absence,
}

impl OtherMembers {
    /// Connects to nobody yet. Without a dialer it never does, for tests of one member.
    pub fn new(me: NodeId, disk: Arc<MemberDisk>, dialer: Option<Dialer>) -> Self {
        Self {
            me,
            disk,
            dialer,
            all: Mutex::default(),
            rolled_back: Default::default(),
            has_asked: Default::default(),
        }
    }

    /// What is remembered of the members' data.
    pub fn remembered(&self) -> BTreeMap<NodeId, DataMark> {
        self.disk.known_members()
    }

    /// Checks the greeting of a member: whether it comes with the data of its first connection, which is recorded, and with all
    /// that it had acknowledged when the connection began and this member remembered `before`; and whether this member has all
    /// that the other one remembers of it.
    pub fn check(
        &self,
        id: NodeId,
        mark: DataMark,
        remembers: Option<&DataMark>,
        before: &BTreeMap<NodeId, DataMark>,
    ) -> Result<(), ConnectionRefusal> {
        self.check_own(id, remembers)?;
        let Some(known) = self.remembered().get(&id).copied() else {
            return self.disk.set_known(id, Some(mark)).map_err(|error| {
                error!("refused member {id}: cannot record the id of its data: {error}");
                ConnectionRefusal::DataReplaced
            });
        };
        if known.data != mark.data {
            return Err(ConnectionRefusal::DataReplaced);
        }
        let is_less = before.get(&id).is_some_and(|b| b.data == mark.data && b.change > mark.change);
        if is_less && !is_left_out("rollback") {
            return Err(ConnectionRefusal::RolledBack);
        }
        self.disk.note(|all| all.note(id, mark));
        Ok(())
    }

    /// Checks whether this member has what another one remembers of it. If not, it never takes part again.
    fn check_own(&self, id: NodeId, remembered: Option<&DataMark>) -> Result<(), ConnectionRefusal> {
        if self.rolled_back.borrow().is_some() {
            return Err(ConnectionRefusal::RolledBack);
        }
        let Some(remembered) = remembered.filter(|mark| !self.disk.has(mark) && !is_left_out("rollback"))
        else {
            return Ok(());
        };
        let has = self.disk.mark().change;
        let what = match remembered.change > has {
            true => format!("it has {has} changes"),
            false => "it was made without that change".into(),
        };
        let why = format!("member {id} remembers change {} of this data, but {what}", remembered.change);
        if let Err(error) = self.disk.set_rolled_back(&why) {
            error!("cannot store that this member's data must not be used: {error}");
        }
        self.rolled_back.send_replace(Some(why));
        Err(ConnectionRefusal::RolledBack)
    }

    /// Notes what a member tells with a request: how far its data has come, and what it remembers of others, of which only
    /// members of the cluster count.
    pub fn hear(
        &self,
        from: NodeId,
        ask: &PeerAsk,
        is_member: impl Fn(NodeId) -> bool,
    ) -> Result<(), ConnectionRefusal> {
        self.check_own(from, ask.remembers.get(&self.me))?;
        let others = ask.remembers.iter().filter(|(id, _)| **id != self.me && is_member(**id));
        self.disk.note(|all| {
            all.note(from, ask.mark);
            others.for_each(|(id, mark)| all.hear_of(*id, *mark));
        });
        Ok(())
    }

    /// Forgets the data of a member that was removed, which may be added again with other data.
    pub fn forget(&self, id: NodeId) -> Result<(), DiskError> {
        if !self.remembered().contains_key(&id) {
            return Ok(());
        }
        self.disk.set_known(id, None)
    }

    /// Waits until this member's data must not be used any more, and returns why.
    pub async fn rolled_back(&self) -> String {
        let mut why = self.rolled_back.subscribe();
        // The sender lives as long as this.
        why.wait_for(Option::is_some).await.ok().and_then(|why| why.clone()).unwrap_or_default()
    }

    /// Says that the others that can be reached have been asked what they remember of this member.
    pub fn set_asked(&self) {
        self.has_asked.send_replace(true);
    }

    /// Waits for [`OtherMembers::set_asked`].
    pub async fn asked(&self) {
        if *self.has_asked.borrow() {
            return;
        }
        // The sender lives as long as this.
        self.has_asked.subscribe().wait_for(|asked| *asked).await.ok();
    }

    /// The member with this number at this address; all callers share one connection to it.
    pub fn get(&self, to: NodeId, address: &str) -> Arc<OtherMember> {
        let mut all = self.all.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let new = || {
            Arc::new(OtherMember {
                to,
                address: address.into(),
                link: AsyncMutex::default(),
                absence: Absence::default(),
            })
        };
        let peer = all.entry(to).or_insert_with(new);
        if peer.address != address {
            *peer = new();
        }
        peer.clone()
    }

    async fn link(&self, peer: &OtherMember) -> Result<Arc<NodeConnection>, ConnectionError> {
        let mut kept = peer.link.lock().await;
        if let Some(link) = kept.as_ref().filter(|link| link.is_open()) {
            return Ok(link.clone());
        }
        *kept = None;
        let dialer = self.dialer.as_ref().ok_or(ConnectionError::Ended)?;
        let before = self.remembered();
        let hello = || MemberHello {
            id: self.me,
            to: peer.to,
            mark: self.disk.mark(),
            remembers: self.remembered().get(&peer.to).copied(),
        };
        let (link, welcome) = dialer.connect(&peer.address, Some(&hello), CONNECT_PATIENCE).await?;
        let refused = welcome.refused.map_or(Ok(()), Err);
        // What it remembers is checked also if it refuses: it may be the reason.
        let checked = self.check(peer.to, welcome.mark, welcome.remembers.as_ref(), &before).and(refused);
        checked.map_err(ConnectionError::Refused)?;
        let link = Arc::new(link);
        *kept = Some(link.clone());
        Ok(link)
    }

    /// Connects to a member, unless there is a connection; returns when something was last received on it.
    pub async fn reach(&self, peer: &OtherMember) -> Result<Instant, ConnectionError> {
        Ok(self.link(peer).await?.last_heard())
    }

    /// Sends a request to a member. The future may be dropped at any time.
    pub async fn ask(
        &self,
        peer: &OtherMember,
        request: PeerRequest,
        patience: Duration,
    ) -> Result<PeerResponse, ConnectionError> {
        let answer = self.ask_once(peer, request, patience).await;
        peer.absence.note(peer.to, &peer.address, &answer);
        answer
    }

    async fn ask_once(
        &self,
        peer: &OtherMember,
        request: PeerRequest,
        patience: Duration,
    ) -> Result<PeerResponse, ConnectionError> {
        let link = self.link(peer).await?;
        let ask = PeerAsk { mark: self.disk.mark(), remembers: self.disk.known_members(), request };
        let answer: Result<PeerAnswer, _> = link.ask(&ask, patience).await;
        if matches!(answer, Err(ConnectionError::Silent)) && link.last_heard().elapsed() > SILENCE_MAX {
            link.close();
        }
        let answer = answer?;
        self.disk.note(|all| all.note(peer.to, answer.mark));
        Ok(answer.response)
    }
}
