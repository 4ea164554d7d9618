//! The connections from this member to the others, and the id of the data directory that each of them is known to have.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as AsyncMutex;

use crate::connection::{ConnectionError, Dialer, NodeConnection};
use crate::names::CopyId;
use crate::server::disk::{DiskError, MemberDisk};
use crate::wire::{ConnectionRefusal, MemberHello, NodeId, PeerRequest, PeerResponse};

/// A connection on which a request has no answer and nothing was received for this long is replaced.
const SILENCE_MAX: Duration = Duration::from_millis(300);
const CONNECT_PATIENCE: Duration = Duration::from_millis(300);

/// The data directory of each other member. A member that comes with another one has lost its log and its vote and must not take
/// part as before: it could vote twice in a term, or deny what it has acknowledged.
pub struct DataOfMembers {
    disk: Arc<MemberDisk>,
    known: Mutex<BTreeMap<NodeId, u128>>,
}

impl DataOfMembers {
    /// Reads the known ids from the disk.
    pub fn new(disk: Arc<MemberDisk>) -> Result<Self, DiskError> {
        let known = Mutex::new(disk.data_of_members()?);
        Ok(Self { disk, known })
    }

    /// Whether a member may connect with this data: it must be that of its first connection, which is recorded.
    pub fn admits(&self, id: NodeId, data: CopyId) -> bool {
        let mut known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = known.get(&id) {
            return *known == u128::from(data);
        }
        if let Err(error) = self.disk.set_data_of_member(id, Some(data)) {
            eprintln!("refused member {id}: cannot record the id of its data: {error}");
            return false;
        }
        known.insert(id, data.into());
        true
    }

    /// Forgets the data of a member that was removed, which may be added again with other data.
    pub fn forget(&self, id: NodeId) -> Result<(), DiskError> {
        let mut known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if known.remove(&id).is_some() {
            self.disk.set_data_of_member(id, None)?;
        }
        Ok(())
    }
}

/// All other members.
pub struct OtherMembers {
    me: NodeId,
    data: CopyId,
    dialer: Option<Dialer>,
    /// See [`DataOfMembers`].
    pub data_of: DataOfMembers,
    all: Mutex<BTreeMap<NodeId, Arc<OtherMember>>>,
}

/// One other member.
pub struct OtherMember {
    to: NodeId,
    address: String,
    link: AsyncMutex<Option<Arc<NodeConnection>>>,
}

impl OtherMembers {
    /// Connects to nobody yet. Without a dialer it never does, for tests of one member.
    pub fn new(me: NodeId, disk: Arc<MemberDisk>, dialer: Option<Dialer>) -> Result<Self, DiskError> {
        let data = disk.data();
        Ok(Self { me, data, dialer, data_of: DataOfMembers::new(disk)?, all: Mutex::default() })
    }

    /// The member with this number at this address; all callers share one connection to it.
    pub fn get(&self, to: NodeId, address: &str) -> Arc<OtherMember> {
        let mut all = self.all.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let new = || Arc::new(OtherMember { to, address: address.into(), link: AsyncMutex::default() });
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
        let dialer = self.dialer.as_ref().ok_or(ConnectionError::Ended)?;
        let hello = MemberHello { id: self.me, data: self.data, to: peer.to };
        let (link, welcome) = dialer.connect(&peer.address, Some(hello), CONNECT_PATIENCE).await?;
        if !self.data_of.admits(peer.to, welcome.data) {
            return Err(ConnectionError::Refused(ConnectionRefusal::DataReplaced));
        }
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
        request: &PeerRequest,
        patience: Duration,
    ) -> Result<PeerResponse, ConnectionError> {
        let link = self.link(peer).await?;
        let answer = link.ask(request, patience).await;
        if matches!(answer, Err(ConnectionError::Silent)) && link.last_heard().elapsed() > SILENCE_MAX {
            link.close();
        }
        answer
    }
}
