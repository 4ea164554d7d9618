//! Tells when another member no longer answers this one, and when it is back. Followers ask nobody, so it is the leader that
//! notices.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::refusal_log::RefusalReasons;
use crate::wire::NodeId;

/// A member that has not answered for this long is said to be lost.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// Since when a member has not answered.
#[derive(Default)]
pub struct Absence {
    missing: Mutex<Option<Missing>>,
    lines: RefusalReasons,
}

struct Missing {
    since: Instant,
    told: bool,
}

impl Absence {
    /// The member has answered, or this failed.
    pub fn note<T, E: Display>(&self, id: NodeId, address: &str, answer: &Result<T, E>) {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match answer {
            Ok(_) => {
                if let Some(Missing { since, told: true }) = missing.take() {
                    info!("member {id} at {address} is back after {:.1?}", now - since);
                }
            }
            Err(error) => {
                let missing = missing.get_or_insert(Missing { since: now, told: false });
                if !missing.told
                    && now - missing.since >= LOST_AFTER
                    && self.lines.refused("lost", now).is_some()
                {
                    missing.told = true;
                    warn!("member {id} at {address} has not answered for {LOST_AFTER:?}: {error}");
                }
            }
        }
    }
}
