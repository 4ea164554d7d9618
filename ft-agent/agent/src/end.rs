//! The end of a VM, and of one replica (rule 8).

use entry::log::EndReason;
use logging_channel::message::Message;

use crate::Role;
use crate::agent::{Agent, Side, State};
use crate::event::{Action, Exit};

impl Agent {
    /// The guest's run is over and the log has its end. Its last outputs leave first, then the backup is told.
    pub(crate) fn guest_ended(&mut self, now: u64, reason: EndReason) {
        match self.state {
            State::Protected if self.config.role == Role::Primary => {
                self.state = State::Ending { reason, told: false };
                self.flush();
                self.settle(now);
            }
            State::Alone => {
                self.actions.push_back(Action::Release);
                self.forget(Exit::Ended(reason));
            }
            State::Suspecting | State::Taking => self.ended = Some(reason),
            _ => {}
        }
    }

    /// A primary lets the backup go on in its place: the guest pauses, everything is settled, the backup is told. A backup
    /// leaves: it says so, and never takes.
    pub(crate) fn hand_over(&mut self, now: u64) {
        match (self.config.role, &self.state) {
            (Role::Primary, State::Protected) => {
                self.state = State::HandingOver { told: false };
                self.handing_over = true;
                self.actions.push_back(Action::Pause);
                self.flush();
                self.settle(now);
            }
            (Role::Backup, State::Protected | State::Waiting | State::Met) => {
                if self.connected {
                    self.outbox.push(&Message::Failed { reason: Exit::Stopped.to_string() });
                }
                self.halt(Exit::Stopped);
            }
            _ => {}
        }
    }

    fn flush(&mut self) {
        if let Some(Side::Primary(sender)) = &mut self.side {
            sender.flush(&mut self.outbox);
        }
    }

    /// Primary: once everything is acknowledged and has left, the backup is told what comes now.
    pub(crate) fn settle(&mut self, _now: u64) {
        let Some(Side::Primary(sender)) = &self.side else { return };
        let cursors = sender.cursors();
        if !sender.is_settled() || cursors.outputs_released < cursors.outputs_recorded {
            return;
        }
        let message = match &mut self.state {
            State::HandingOver { told } if !*told => {
                *told = true;
                Message::HandOver
            }
            State::Ending { reason, told } if !*told => {
                *told = true;
                Message::End(*reason)
            }
            _ => return,
        };
        self.outbox.push(&message);
    }

    /// Backup: the primary has stopped its guest and wants it to go on here.
    pub(crate) fn succeed(&mut self, now: u64) {
        self.state = State::Succeeding;
        self.handing_over = true;
        if let Some(Side::Backup(receiver)) = &mut self.side {
            receiver.close();
        }
        self.take_when_able(now);
    }

    /// Backup: the VM has ended. It never takes; its disks are complete when the rest is replayed.
    pub(crate) fn peer_ended(&mut self, reason: EndReason) {
        self.state = State::Ending { reason, told: true };
        self.outbox.push(&Message::Ended);
        if let Some(Side::Backup(receiver)) = &mut self.side {
            receiver.close();
        }
        self.finish_when_replayed();
    }

    pub(crate) fn finish_when_replayed(&mut self) {
        if let (State::Ending { reason, .. }, Some(Side::Backup(receiver))) = (&self.state, &self.side)
            && receiver.is_drained()
        {
            self.forget(Exit::Ended(*reason));
        }
    }

    /// Primary: the backup knows of the end.
    pub(crate) fn end_acknowledged(&mut self) {
        if let State::Ending { reason, told: true } = self.state {
            self.forget(Exit::Ended(reason));
        }
    }

    /// The store forgets the VM, so that it can be started again.
    pub(crate) fn forget(&mut self, exit: Exit) {
        let Some(generation) = self.generation else { return self.halt(exit) };
        self.state = State::Forgetting(exit);
        self.actions.push_back(Action::Forget { generation });
    }

    pub(crate) fn forgotten(&mut self, now: u64, done: bool) {
        let State::Forgetting(exit) = &self.state else { return };
        if done {
            let exit = exit.clone();
            self.halt(exit);
        } else {
            self.ask_later(now);
        }
    }
}
