//! What the guest's thread, and the one that it works for, have to do with a replica.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use agent::{Event, Exit, NextRecord, Pace};
use entry::log::{EndReason, Entry, Record};
use entry::{Output, Position};
use test_and_set::names::Generation;
use vmm::inbox::InboxSender;

use super::{Guard, Replica, TURN_INTERVAL, now_ns};
use crate::failpoint;

/// The longest that a guest that is slowed sleeps at once.
const SLOW_MAX_NS: u64 = 20_000_000;

/// A guest that has made no output is looked at no sooner.
const LOOK_NS: u64 = 50_000;

/// One record in so many is timed, and counts for all: a guest may take 100,000 frames a second.
const TIMED: u64 = 16;

/// What the guest's thread has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Run the guest.
    Run,
    /// Run it alone.
    Alone,
    /// End its run: the user wants it.
    Stop,
    /// Say in the log how it stands, and that it goes on elsewhere.
    HandOver,
    /// Leave.
    Exit(Exit),
}

impl Replica {
    /// From where the guest's thread is woken.
    pub fn set_guest(&self, guest: InboxSender) {
        let mut state = self.lock();
        state.guest = Some(guest);
        self.announce_change(&state);
    }

    /// Waits until the pair is open, the peer is refused (`None`), or this side is out.
    ///
    /// # Errors
    /// This side is out.
    pub fn wait_started(&self, until_refused: bool) -> Result<Option<Generation>, Exit> {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return Err(exit.clone());
            }
            if state.started.is_some() {
                return Ok(state.started);
            }
            if until_refused && state.refused.is_some() {
                return Ok(None);
            }
            state = self.wait(state, TURN_INTERVAL);
        }
    }

    /// Whether the guest's thread has another duty than to run.
    pub fn needs_attention(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// What the guest's thread has to do, which waits here while its guest has to rest.
    pub fn attend(&self, alone_already: bool) -> Duty {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return Duty::Exit(exit.clone());
            }
            if state.stop {
                state.stop = false;
                return Duty::Stop;
            }
            if state.alone {
                self.attention.store(false, Ordering::Release);
                state.paused = false;
                return if alone_already { Duty::Run } else { Duty::Alone };
            }
            if std::mem::take(&mut state.hand_over) {
                return Duty::HandOver;
            }
            if !state.paused {
                self.attention.store(false, Ordering::Release);
                return Duty::Run;
            }
            state = self.rest(state);
        }
    }

    /// Waits until the replica is out.
    pub fn wait_exit(&self) -> Exit {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return exit.clone();
            }
            state = self.rest(state);
        }
    }

    /// Waits until this side lives or is out.
    pub fn wait_verdict(&self) -> Result<(), Exit> {
        let mut state = self.lock();
        loop {
            if let Some(exit) = &state.exit {
                return Err(exit.clone());
            }
            if state.alone {
                return Ok(());
            }
            state = self.rest(state);
        }
    }

    /// A turn of a guest's loop that has nothing to do.
    fn rest<'a>(&'a self, mut state: Guard<'a>) -> Guard<'a> {
        let at = state.agent.status(now_ns()).position;
        state.agent.turn(now_ns(), at);
        self.wait(state, TURN_INTERVAL)
    }

    /// Primary: the guest's thread is about to wait, for [`TURN_INTERVAL`] at most, and sends what outputs wait for.
    pub fn before_wait(self: &Arc<Self>) {
        let begin = now_ns();
        let mut state = self.lock();
        state.agent.rest(begin);
        self.settle(&mut state);
        // Where outputs wait, somebody may wait for them.
        if state.gate.recorded() > state.gate.released() {
            self.hand_back(&mut state);
        }
        self.spent.recording_ns.add(now_ns() - begin);
    }

    /// A guest's thread that has waited makes a turn.
    pub fn turn(self: &Arc<Self>) {
        let mut state = self.lock();
        let now = now_ns();
        state.looked_at = now;
        state.poll(now);
        let at = state.agent.status(now).position;
        state.agent.turn(now, at);
        self.settle(&mut state);
    }

    /// Primary: the guest's loop makes a turn; it waits here as long as its guest is too fast.
    pub fn look(self: &Arc<Self>, at: Position) {
        failpoint::wedge("guest");
        let (begin, mut rested) = (now_ns(), 0);
        if begin < self.look_at.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        state.poll(begin);
        let mut now = begin;
        loop {
            state.agent.turn(now, at);
            let pace = state.agent.pace(now);
            if pace != Pace::Free {
                state.agent.rest(now);
            }
            let ran = now.saturating_sub(state.looked_at);
            self.settle(&mut state);
            match pace {
                _ if self.needs_attention() => break,
                Pace::Free => break,
                Pace::Share(share) => {
                    let rest = ran.saturating_mul(1000 - share) / share.max(1);
                    self.hand_back(&mut state);
                    drop(state);
                    let rest_begins = now_ns();
                    std::thread::sleep(Duration::from_nanos(rest.min(SLOW_MAX_NS)));
                    state = self.lock();
                    rested += now_ns() - rest_begins;
                    break;
                }
                Pace::Stop => {
                    let rest_begins = now_ns();
                    state = self.wait(state, TURN_INTERVAL);
                    now = now_ns();
                    rested += now - rest_begins;
                }
            }
        }
        let end = now_ns();
        state.looked_at = end;
        self.look_at.store(end + LOOK_NS, Ordering::Relaxed);
        self.spent.slowed_ns.add(rested);
        self.spent.recording_ns.add(end - begin - rested);
    }

    /// Primary: appends a record. An output's is sent at a [`Replica::look`], together with those of the other outputs of
    /// the same exit and, where there are many, of the last ones.
    pub fn append(self: &Arc<Self>, record: &Record) {
        let mut state = self.lock();
        state.appended += 1;
        let timed = state.appended.is_multiple_of(TIMED).then(now_ns);
        let now = state.looked_at;
        let is_due = state.agent.append(now, record);
        if matches!(record.entry, Entry::Output(_)) {
            self.look_at.store(0, Ordering::Relaxed);
        } else if is_due {
            self.settle(&mut state);
        }
        if let Some(begin) = timed {
            self.spent.recording_ns.add(TIMED * (now_ns() - begin));
        }
    }

    /// Holds an output until it may leave.
    pub fn hold(self: &Arc<Self>, output: Output) {
        let begin = now_ns();
        let mut state = self.lock();
        state.gate.hold(output);
        self.spent.held_ns.sub(begin);
        state.drop_released();
        if state.agent.release_limit(begin) > state.gate.released() {
            state.release();
        }
        // Nobody looks at a guest that is alone; one with a backup is looked at before it runs on.
        if state.alone {
            self.settle(&mut state);
        }
        if state.gate.recorded().is_multiple_of(TIMED) {
            self.spent.recording_ns.add(TIMED * (now_ns() - begin));
        }
    }

    /// Backup: everything that was taken has been replayed, up to here; waits for the next record. `None`: there are no
    /// more.
    pub fn next_record(self: &Arc<Self>, replayed: u64, at: Position) -> Option<Record> {
        failpoint::wedge("guest");
        let mut state = self.lock();
        state.agent.handle(now_ns(), Event::Replayed { records: replayed, position: at });
        loop {
            let now = now_ns();
            state.poll(now);
            state.agent.turn(now, at);
            self.settle(&mut state);
            if state.exit.is_some() {
                return None;
            }
            match state.agent.next_record() {
                NextRecord::Record(record) => return Some(record),
                NextRecord::End => return None,
                // While much comes, to be woken for each piece of it costs both hosts more than to look again soon.
                NextRecord::Wait => {
                    state = match state.polling.due(now) {
                        Some(due) => self.wait_for(state, Duration::from_nanos(due.saturating_sub(now))),
                        None => self.wait(state, TURN_INTERVAL),
                    }
                }
            }
        }
    }

    /// The guest's run is over.
    pub fn guest_ended(self: &Arc<Self>, reason: EndReason) {
        self.handle(Event::GuestEnded(reason));
    }

    /// The guest runs on, after this side went live.
    pub fn runs_on(&self) {
        self.lock().story.running(now_ns());
    }
}
