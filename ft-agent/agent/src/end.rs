//! The end of a VM, and of one replica (rule 8).

use entry::log::EndReason;
use logging_channel::message::{Message, Role};

use crate::agent::Agent;
use crate::event::{Action, Outcome};
use crate::state::{AgentState, LogSide};

impl Agent {
    /// The guest's run is over and the log has its end. The last outputs leave first, then the backup is
    /// told.
    pub(crate) fn guest_ended(&mut self, reason: EndReason) {
        match self.state {
            AgentState::Protected if self.config.role == Role::Primary => {
                self.state = AgentState::Ending { reason, told: false };
                self.flush();
                self.tell_backup_when_flushed();
            }
            AgentState::Alone => {
                self.actions.push_back(Action::Release);
                self.ask_to_record_end(Outcome::Ended(reason));
            }
            AgentState::Suspecting | AgentState::Taking => self.pending_end = Some(reason),
            _ => {}
        }
    }

    pub(crate) fn flush(&mut self) {
        if let Some(LogSide::Primary(sender)) = &mut self.log_side {
            sender.flush(&mut self.outbox);
        }
    }

    /// Primary: tells the backup of the handover or of the VM's end, once all records are acknowledged and
    /// all outputs have left.
    pub(crate) fn tell_backup_when_flushed(&mut self) {
        let Some(LogSide::Primary(sender)) = &self.log_side else { return };
        let cursors = sender.cursors();
        if !sender.is_fully_acked() || cursors.outputs_released < cursors.outputs_recorded {
            return;
        }
        let yields = self.can_yield();
        let message = match &mut self.state {
            AgentState::HandingOver { told, .. } if !*told => {
                *told = true;
                if yields { Message::Prepare } else { Message::HandOver }
            }
            AgentState::Ending { reason, told } if !*told => {
                *told = true;
                Message::End(*reason)
            }
            _ => return,
        };
        self.outbox.push(&message);
    }

    /// Backup: the VM has ended. This side never takes; its disks are complete when the rest of the log is
    /// replayed.
    pub(crate) fn end_received(&mut self, reason: EndReason) {
        self.state = AgentState::Ending { reason, told: true };
        self.outbox.push(&Message::Ended);
        if let Some(LogSide::Backup(receiver)) = &mut self.log_side {
            receiver.close();
        }
        self.finish_when_replayed();
    }

    /// Backup: has the store record that the VM has ended, once all of the log is replayed.
    pub(crate) fn finish_when_replayed(&mut self) {
        if let (AgentState::Ending { reason, .. }, Some(LogSide::Backup(receiver))) =
            (&self.state, &self.log_side)
            && receiver.is_drained()
        {
            self.ask_to_record_end(Outcome::Ended(*reason));
        }
    }

    /// Primary: the backup knows that the VM has ended.
    pub(crate) fn end_acknowledged(&mut self) {
        if let AgentState::Ending { reason, told: true } = self.state {
            self.ask_to_record_end(Outcome::Ended(reason));
        }
    }

    /// Asks the store to record the VM's end, so that it can be started again. Then this replica ends with
    /// `outcome`.
    pub(crate) fn ask_to_record_end(&mut self, outcome: Outcome) {
        let Some(generation) = self.generation else { return self.halt(outcome) };
        self.state = AgentState::RecordingEnd(outcome);
        self.actions.push_back(Action::End { generation, who: self.incarnation() });
    }

    pub(crate) fn end_recorded(&mut self, now: u64, done: bool) {
        let AgentState::RecordingEnd(outcome) = &self.state else { return };
        if done {
            let outcome = outcome.clone();
            self.halt(outcome);
        } else {
            self.retry_later(now);
        }
    }
}
