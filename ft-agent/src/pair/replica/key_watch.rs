//! Watches the keys while a replica runs: ends the link of a peer that is no longer accepted, and shows the peer a new key.

use std::sync::Arc;
use std::time::Duration;

use agent::{Event, KeyProof, Phase};
use test_and_set::keys::Keys;
use tracing::warn;

use super::{Replica, now_ns};
use crate::error::Error;
use crate::service;

/// How often the keys are checked.
const INTERVAL: Duration = Duration::from_millis(250);

impl Replica {
    /// Starts to watch the keys, on a thread of its own, until this side has ended.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn watch_keys(self: &Arc<Self>, keys: Arc<Keys>) -> Result<(), Error> {
        let watched = Arc::downgrade(self);
        let watch = move || {
            while let Some(replica) = watched.upgrade().filter(|replica| !replica.is_out()) {
                replica.check_keys(&keys);
                drop(replica);
                std::thread::sleep(INTERVAL);
            }
        };
        service::start("keys", watch)
    }

    /// Without its keeper this side gets no verdict: it leaves the guest to the other side, unless it is alone.
    fn keeper_lost(self: &Arc<Self>) {
        let ended = std::io::Error::other("the process that keeps its keys has ended");
        self.fail_unless(
            |state| state.agent.status(now_ns()).phase == Phase::Alone,
            Error::Host { what: "this host can show its key to nobody".into(), source: ended },
        );
    }

    /// Checks the keys of the link. What reads files does so while nothing is locked.
    fn check_keys(self: &Arc<Self>, keys: &Keys) {
        let own = keys.own();
        if keys.is_lost() {
            return self.keeper_lost();
        }
        let begun = {
            let mut state = self.lock();
            let role = state.agent.status(now_ns()).role;
            state.link.as_mut().map(|link| (link.socket().clone(), link.begin_key_check(role, &own)))
        };
        let Some((socket, check)) = begun else { return };
        let checked = check.run(keys);
        let mut state = self.lock();
        let Some(link) = state.link.as_mut().filter(|link| Arc::ptr_eq(link.socket(), &socket)) else {
            return;
        };
        link.keys.checked(checked.keys);
        if !checked.accepted {
            warn!("the peer's certificate is no longer accepted: it is not in peers/; the connection ends");
            state.agent.handle(now_ns(), Event::Disconnected);
        } else if let Some(proof) = &checked.proof {
            state.agent.handle(now_ns(), Event::KeyReplaced(proof));
        } else {
            return;
        }
        self.process_actions(&mut state);
        self.wake_pump();
    }
}

/// The peer has sent a proof of its new key.
pub(super) fn peer_key(state: &mut super::state::ReplicaState, proof: KeyProof) {
    if let Some(link) = &mut state.link {
        link.keys.proof_received(proof);
    }
}
