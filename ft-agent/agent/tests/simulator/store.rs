//! The store, and how commands and answers get lost on their way.

use agent::{Event, Phase};
use store_rule::record::{Applied, Command, CommandReply, Verdict};

use super::MS;
use super::sim_event::{SimEvent, SimResult};
use super::world::World;

impl World {
    pub fn send_to_store(&mut self, host: usize, id: u64, command: Command) {
        let away = self.rng.between(MS / 5, 2 * MS);
        let nothing = SimEvent::Answer { host, id, command: command.clone(), reply: None };
        let reachable = self.store_cut_until[host] <= self.now && !self.rng.chance(30);
        if !reachable {
            return self.schedule_after(15 * MS, nothing);
        }
        let at = self.now + away;
        if at < self.no_quorum_until {
            // The command may be in a log that a quorum accepts later.
            if self.rng.chance(300) {
                let later = self.no_quorum_until + away;
                self.schedule_at(later, SimEvent::Apply { command, reply_to: None });
            }
            return self.schedule_after(15 * MS, nothing);
        }
        if self.rng.chance(50) {
            self.schedule_after(away + 40 * MS, SimEvent::Apply { command: command.clone(), reply_to: None });
        }
        let reply_to = Some((host, id));
        if self.rng.chance(50) {
            // The answer is lost.
            self.schedule_at(at, SimEvent::Apply { command, reply_to: None });
            return self.schedule_after(15 * MS, nothing);
        }
        self.schedule_at(at, SimEvent::Apply { command: command.clone(), reply_to });
        if self.rng.chance(30) {
            // The answer comes twice.
            self.schedule_at(at + MS, SimEvent::Apply { command, reply_to });
        }
    }

    pub fn apply_command(&mut self, command: Command, reply_to: Option<(usize, u64)>) {
        let reply = self.store.apply(&self.vm, &command, None);
        if let Some((host, id)) = reply_to {
            self.schedule_between(MS / 5, 2 * MS, SimEvent::Answer { host, id, command, reply: Some(reply) });
        }
    }

    pub fn answer(&mut self, host: usize, command: &Command, reply: Option<CommandReply>) -> SimResult {
        self.trace(host, &reply);
        match command {
            Command::Take { .. } => {
                let verdict = reply.and_then(|reply| reply.try_into().ok()).unwrap_or(Verdict::Unknown(()));
                self.checker.counts.unknown_verdicts += (verdict == Verdict::Unknown(())) as u64;
                self.handle_event(host, Event::Verdict(verdict))?;
                let phase = self.hosts[host].process.as_ref().map(|p| p.agent.status(0).phase);
                if verdict == Verdict::Won
                    && matches!(phase, Some(Phase::Starting | Phase::Protected | Phase::Deciding))
                {
                    return Err(format!("{} has won but does not live: {phase:?}", ["A", "B"][host]));
                }
                Ok(())
            }
            Command::Open { .. } => {
                let opened = reply.and_then(|reply| Applied::try_from(reply).ok());
                self.handle_event(host, Event::Opened(opened))
            }
            Command::End { .. } => self.handle_event(host, Event::EndRecorded(reply.is_some())),
            // No agent forgets a VM.
            Command::Forget { .. } => Ok(()),
        }
    }
}
