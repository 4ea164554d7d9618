//! How questions to the store and its answers travel, and get lost.

use agent::{Event, Phase, Rule, StoreView};
use store_rule::record::{Applied, Command, CommandReply, Verdict};

use super::MS;
use super::sim_event::{SimEvent, SimResult, StoreAnswer, StoreQuestion};
use super::world::World;

/// How long a process waits for an answer.
const STORE_PATIENCE: u64 = 15 * MS;

impl World {
    pub fn send_to_store(&mut self, host: usize, id: u64, question: StoreQuestion) {
        let away = self.rng.between(MS / 5, 2 * MS);
        let nothing = SimEvent::Answer { host, id, question: question.clone(), answer: None };
        let reachable = self.store_cut_until[host] <= self.now && !self.rng.chance(30);
        if !reachable {
            return self.schedule_after(STORE_PATIENCE, nothing);
        }
        let unheard = SimEvent::Reach { host, question: question.clone(), reply_to: None };
        let at = self.now + away;
        if at < self.no_quorum_until {
            // A command may be in a log that a quorum accepts later.
            if self.rng.chance(300) {
                self.schedule_at(self.no_quorum_until + away, unheard);
            }
            return self.schedule_after(STORE_PATIENCE, nothing);
        }
        if self.rng.chance(50) {
            self.schedule_after(away + 40 * MS, unheard.clone());
        }
        if self.rng.chance(50) {
            // The answer is lost.
            self.schedule_at(at, unheard);
            return self.schedule_after(STORE_PATIENCE, nothing);
        }
        let heard = SimEvent::Reach { host, question, reply_to: Some(id) };
        self.schedule_at(at, heard.clone());
        if self.rng.chance(30) {
            // The answer comes twice.
            self.schedule_at(at + MS, heard);
        }
    }

    /// A question of a host reaches the store.
    pub fn reach_store(&mut self, host: usize, question: StoreQuestion, reply_to: Option<u64>) -> SimResult {
        let refused = self.revoked[host].store && self.without != Some(Rule::RefuseRevokedKeys);
        let answer = match &question {
            _ if refused => None,
            StoreQuestion::Change(command) => {
                let holder = self.store.answered().get(&self.vm).and_then(|r| r.holder());
                let reply = self.store.change(self.now, &self.vm, command.clone());
                if let (Command::Take { generation, who }, Some(CommandReply::Won)) = (command, &reply) {
                    self.checker.won(*generation, *who)?;
                    if self.revoked[host].store && holder != Some(*who) {
                        return Err(format!("{} wins although its key is revoked", ["A", "B"][host]));
                    }
                }
                reply.map(StoreAnswer::Reply)
            }
            StoreQuestion::Look { generation, who } => {
                let seen = self.store.read(self.now).map(|state| state.get(&self.vm).cloned());
                seen.map(|record| StoreAnswer::View(StoreView::of(record.as_ref(), *generation, *who)))
            }
        };
        if let Some(id) = reply_to {
            let back = if answer.is_some() { self.rng.between(MS / 5, 2 * MS) } else { STORE_PATIENCE };
            self.schedule_after(back, SimEvent::Answer { host, id, question, answer });
        }
        Ok(())
    }

    pub fn answer(
        &mut self,
        host: usize,
        question: &StoreQuestion,
        answer: Option<StoreAnswer>,
    ) -> SimResult {
        self.trace(host, &answer);
        let reply = match answer {
            Some(StoreAnswer::Reply(reply)) => Some(reply),
            Some(StoreAnswer::View(view)) => return self.handle_event(host, Event::Looked(Some(view))),
            None => None,
        };
        match question {
            StoreQuestion::Look { .. } => self.handle_event(host, Event::Looked(None)),
            StoreQuestion::Change(Command::Take { .. }) => self.verdict(host, reply),
            StoreQuestion::Change(Command::Open { .. }) => {
                let opened = reply.and_then(|reply| Applied::try_from(reply).ok());
                self.handle_event(host, Event::Opened(opened))
            }
            StoreQuestion::Change(Command::End { .. }) => {
                self.handle_event(host, Event::EndRecorded(reply.is_some()))
            }
            // No agent forgets a VM.
            StoreQuestion::Change(Command::Forget { .. }) => Ok(()),
        }
    }

    fn verdict(&mut self, host: usize, reply: Option<CommandReply>) -> SimResult {
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
}
