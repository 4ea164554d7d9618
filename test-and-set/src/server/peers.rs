//! The connections from this member to the others, and which data each of them is known to have.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;

use crate::link::{Dialer, Link, LinkError};
use crate::names::CopyId;
use crate::server::disk::{Disk, DiskError};
use crate::wire::{MemberHello, NodeId, PeerAnswer, PeerAsk, Unwelcome};

/// A connection on which nothing was heard for so long, with questions under way, is made anew.
const SILENCE_MAX: Duration = Duration::from_millis(300);
const CONNECT_PATIENCE: Duration = Duration::from_millis(300);

/// Which data each other member has. A member that comes with other data has lost its log and its vote, and must not take part
/// as the one it was: it could vote twice in one term, or deny what it has acknowledged.
pub struct DataOfMembers {
    disk: Arc<Disk>,
    known: Mutex<BTreeMap<NodeId, u128>>,
}

impl DataOfMembers {
    /// Reads what is known.
    pub fn new(disk: Arc<Disk>) -> Result<Self, DiskError> {
        let known = Mutex::new(disk.data_of_members()?);
        Ok(Self { disk, known })
    }

    /// Whether a member may come with this data: the first that it comes with is kept.
    pub fn allows(&self, id: NodeId, data: CopyId) -> bool {
        let mut known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = known.get(&id) {
            return *known == u128::from(data);
        }
        if let Err(error) = self.disk.set_data_of_member(id, Some(data)) {
            eprintln!("member {id} is not let in, because its data cannot be noted: {error}");
            return false;
        }
        known.insert(id, data.into());
        true
    }

    /// Forgets a member that was removed; added anew it comes with new data.
    pub fn forget(&self, id: NodeId) -> Result<(), DiskError> {
        let mut known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if known.remove(&id).is_some() {
            self.disk.set_data_of_member(id, None)?;
        }
        Ok(())
    }
}

/// All other members.
pub struct Peers {
    me: NodeId,
    data: CopyId,
    dialer: Option<Dialer>,
    /// See [`DataOfMembers`].
    pub data_of: DataOfMembers,
    all: Mutex<BTreeMap<NodeId, Arc<Peer>>>,
}

/// One other member.
pub struct Peer {
    to: NodeId,
    address: String,
    link: AsyncMutex<Option<Arc<Link>>>,
}

impl Peers {
    /// None is connected yet. Without a dialer none ever is, for tests of one member.
    pub fn new(me: NodeId, disk: Arc<Disk>, dialer: Option<Dialer>) -> Result<Self, DiskError> {
        let data = disk.data();
        Ok(Self { me, data, dialer, data_of: DataOfMembers::new(disk)?, all: Mutex::default() })
    }

    /// The member at this address; one connection serves all who ask.
    pub fn get(&self, to: NodeId, address: &str) -> Arc<Peer> {
        let mut all = self.all.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let new = || Arc::new(Peer { to, address: address.into(), link: AsyncMutex::default() });
        let peer = all.entry(to).or_insert_with(new);
        if peer.address != address {
            *peer = new();
        }
        peer.clone()
    }

    async fn link(&self, peer: &Peer) -> Result<Arc<Link>, LinkError> {
        let mut kept = peer.link.lock().await;
        if let Some(link) = kept.as_ref().filter(|link| link.is_open()) {
            return Ok(link.clone());
        }
        let dialer = self.dialer.as_ref().ok_or(LinkError::Ended)?;
        let hello = MemberHello { id: self.me, data: self.data, to: peer.to };
        let (link, welcome) = dialer.connect(&peer.address, Some(hello), CONNECT_PATIENCE).await?;
        if !self.data_of.allows(peer.to, welcome.data) {
            return Err(LinkError::Refused(Unwelcome::DataReplaced));
        }
        let link = Arc::new(link);
        *kept = Some(link.clone());
        Ok(link)
    }

    /// Asks a member. Safe to be dropped at any time.
    pub async fn ask(&self, peer: &Peer, ask: &PeerAsk, patience: Duration) -> Result<PeerAnswer, LinkError> {
        let link = self.link(peer).await?;
        let answer = link.ask(ask, patience).await;
        if matches!(answer, Err(LinkError::Silent)) && link.last_heard().elapsed() > SILENCE_MAX {
            link.close();
        }
        answer
    }
}
