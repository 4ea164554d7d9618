//! A side that runs the guest looks at the store's record of its VM (rule 11).

use logging_channel::message::Message;

use crate::agent::Agent;
use crate::event::{Action, Outcome};
use crate::rules::Rule;
use crate::state::AgentState;
use crate::watch::StoreView;

impl Agent {
    /// Whether this side runs the guest, and nothing else will make it ask the store.
    pub(crate) fn watches_store(&self) -> bool {
        matches!(self.state, AgentState::Protected | AgentState::Alone) && self.in_force(Rule::WatchTheStore)
    }

    /// Looks at the store's record, when it is time to.
    pub(crate) fn look_when_due(&mut self, now: u64) {
        let Some(generation) = self.generation.filter(|_| self.watches_store()) else { return };
        if self.watch.next_at.take_if(|at| *at <= now).is_some() {
            self.actions.push_back(Action::Look { generation, who: self.incarnation() });
        }
    }

    /// The store has answered a look, or has not (`None`). An answer may be late: what ends this side stays
    /// true, and a side that has left the states that watch asks the store for a verdict anyway.
    pub(crate) fn looked(&mut self, now: u64, view: Option<StoreView>) {
        if !self.watches_store() {
            return;
        }
        match view {
            None => self.watch.missed(now),
            Some(StoreView::Ours) => self.watch.answered(now, false),
            Some(StoreView::Unknown) => self.watch.answered(now, true),
            Some(StoreView::Forgotten) => self.stand_down(Outcome::Forgotten),
            Some(StoreView::Overtaken(generation)) => self.stand_down(Outcome::Overtaken(generation)),
            Some(StoreView::HeldByOther(holder)) => self.stand_down(Outcome::Fenced(Some(holder))),
        }
    }

    /// This side has no right to run the VM: nothing leaves from here on, and the peer is told.
    fn stand_down(&mut self, outcome: Outcome) {
        if self.connected {
            self.outbox.push(&Message::Failed { reason: outcome.to_string() });
        }
        self.halt(outcome);
    }
}
