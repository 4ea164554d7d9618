//! What an agent does wrong while a rule is switched off. Only the simulator builds this.

use entry::log::{Entry, Record};
use logging_channel::versions::ChannelVersions;

use crate::agent::Agent;
use crate::config::Config;
use crate::rules::Rule;
use crate::state::{AgentState, LogSide};

impl Agent {
    /// An agent that ignores a rule.
    pub fn without(rule: Option<Rule>, config: Config, now: u64) -> Agent {
        Agent { without: rule, ..Agent::new(config, now) }
    }

    /// An agent of an earlier release: it knows only these versions of the channel's protocol.
    pub fn speaking(self, versions: ChannelVersions) -> Agent {
        Agent { versions, ..self }
    }

    /// Counts an output as held without appending its record, if that rule is off. Returns whether it did.
    pub(crate) fn holds_unlogged(&mut self, now: u64, record: &Record) -> bool {
        let unlogged = !self.in_force(Rule::LogOutputs) && matches!(record.entry, Entry::Output(_));
        if let Some(LogSide::Primary(sender)) = &mut self.log_side
            && unlogged
        {
            sender.hold_unlogged();
            self.offer_release(now);
        }
        unlogged
    }

    /// Goes back to a peer that was suspected, if the rule against that is off.
    pub(crate) fn resume_suspected_peer(&mut self) {
        let suspects = matches!(self.state, AgentState::Suspecting | AgentState::Taking);
        if suspects && !self.in_force(Rule::OneWaySuspicion) {
            self.state = AgentState::Protected;
        }
    }
}
