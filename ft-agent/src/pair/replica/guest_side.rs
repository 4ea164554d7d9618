//! What the guest's thread, and the main thread that gives it its jobs, do with a replica.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use agent::{Event, GuestPace, NextRecord, Outcome};
use entry::log::{EndReason, Entry, Record};
use entry::{Console, Output, Position};
use test_and_set::names::Generation;
use vmm::inbox::InboxSender;

use super::state::StateGuard;
use super::{Replica, TURN_INTERVAL, now_ns};
use crate::failpoint;

/// The longest time that the guest's thread sleeps at once to slow the guest, ns.
const SLOW_MAX_NS: u64 = 20_000_000;

/// The shortest time between two calls of [`Replica::pace_guest`] that do anything, unless the guest has made
/// an output, ns.
const PACE_INTERVAL_NS: u64 = 50_000;

/// One record in 16 is timed, and its time counts 16 times: reading the clock costs much when 100,000 records
/// are appended per second.
const TIMED_ONE_IN: u64 = 16;

/// What the guest's thread has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Run the guest.
    Run,
    /// Run the guest without a backup from now on.
    Alone,
    /// End the guest's run, because the user wants it.
    Stop,
    /// Append the guest's state to the log, and hand over.
    HandOver,
    /// End this side.
    Leave(Outcome),
}

impl Replica {
    /// Sets the inbox through which the guest's thread is woken.
    pub fn set_guest(&self, guest: InboxSender) {
        let mut state = self.lock();
        // Nothing else is in the inbox of a guest that has not run yet, so this does not wait for room.
        guest.type_text(Console::Serial, &std::mem::take(&mut state.typed)).ok();
        state.guest = Some(guest);
        self.notify_waiters(&state);
    }

    /// Waits until the pair is open, and returns its generation. With `until_refused` it returns `None` if
    /// the peer is refused.
    ///
    /// # Errors
    /// This side has ended.
    pub fn wait_started(&self, until_refused: bool) -> Result<Option<Generation>, Outcome> {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return Err(outcome.clone());
            }
            if state.started.is_some() {
                return Ok(state.started);
            }
            if until_refused && state.refused.is_some() {
                return Ok(None);
            }
            state = self.release_socket_and_wait(state, TURN_INTERVAL);
        }
    }

    /// Whether the guest's thread has a duty other than to run the guest.
    pub fn needs_attention(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// What the guest's thread has to do next. Waits while the guest must not run. `alone_already`: the
    /// thread has begun to run the guest without a backup.
    pub fn next_duty(&self, alone_already: bool) -> Duty {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return Duty::Leave(outcome.clone());
            }
            // A handover is called off first, or is the end of this side.
            if state.stop && (state.alone || !state.paused) {
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
            state = self.idle_turn(state);
        }
    }

    /// Waits until this side has ended.
    pub fn wait_outcome(&self) -> Outcome {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            state = self.idle_turn(state);
        }
    }

    /// Waits until the store has decided that this side lives.
    ///
    /// # Errors
    /// This side has ended.
    pub fn wait_verdict(&self) -> Result<(), Outcome> {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return Err(outcome.clone());
            }
            if state.alone {
                return Ok(());
            }
            state = self.idle_turn(state);
        }
    }

    /// Reports a turn of the guest loop, although it has nothing to do, and waits for a change.
    fn idle_turn<'a>(&'a self, mut state: StateGuard<'a>) -> StateGuard<'a> {
        let at = state.agent.status(now_ns()).position;
        state.agent.guest_loop_turned(now_ns(), at);
        self.release_socket_and_wait(state, TURN_INTERVAL)
    }

    /// Primary: sends the records that outputs wait for, because the guest's thread is about to wait, for
    /// [`TURN_INTERVAL`] at most.
    pub fn before_wait(self: &Arc<Self>) {
        let begin = now_ns();
        let mut state = self.lock();
        state.agent.guest_loop_waits(begin);
        self.process_actions(&mut state);
        // The pump has to receive the acknowledgements that these outputs wait for.
        if state.gate.recorded() > state.gate.released() {
            self.return_socket_to_pump(&mut state);
        }
        self.times.recording_ns.add(now_ns() - begin);
    }

    /// Reports that the guest's thread is alive, after it has waited or while the guest makes no exits.
    pub fn report_alive(self: &Arc<Self>) {
        let mut state = self.lock();
        let now = now_ns();
        state.paced_at = now;
        state.read_link_if_due(now);
        let at = state.agent.status(now).position;
        state.agent.guest_loop_turned(now, at);
        self.process_actions(&mut state);
    }

    /// Primary: reports a turn of the guest loop, and sends what is due. Waits here while the guest is too
    /// fast for the backup.
    pub fn pace_guest(self: &Arc<Self>, at: Position) {
        failpoint::wedge("guest");
        let (begin, mut slowed) = (now_ns(), 0);
        if begin < self.pace_due.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        state.read_link_if_due(begin);
        let mut now = begin;
        loop {
            state.agent.guest_loop_turned(now, at);
            let pace = state.agent.pace(now);
            if pace != GuestPace::Free {
                state.agent.guest_loop_waits(now);
            }
            let ran = now.saturating_sub(state.paced_at);
            self.process_actions(&mut state);
            match pace {
                _ if self.needs_attention() => break,
                GuestPace::Free => break,
                GuestPace::Share(share) => {
                    let pause = ran.saturating_mul(1000 - share) / share.max(1);
                    self.return_socket_to_pump(&mut state);
                    drop(state);
                    let pause_begins = now_ns();
                    std::thread::sleep(Duration::from_nanos(pause.min(SLOW_MAX_NS)));
                    state = self.lock();
                    slowed += now_ns() - pause_begins;
                    break;
                }
                GuestPace::Stop => {
                    let pause_begins = now_ns();
                    state = self.release_socket_and_wait(state, TURN_INTERVAL);
                    now = now_ns();
                    slowed += now - pause_begins;
                }
            }
        }
        let end = now_ns();
        state.paced_at = end;
        self.pace_due.store(end + PACE_INTERVAL_NS, Ordering::Relaxed);
        self.times.slowed_ns.add(slowed);
        self.times.recording_ns.add(end - begin - slowed);
    }

    /// Primary: appends a record. The record of an output is sent by a later [`Replica::pace_guest`],
    /// together with those of the other outputs of the same exit and, if outputs are frequent, with those of
    /// earlier exits.
    pub fn append(self: &Arc<Self>, record: &Record) {
        let mut state = self.lock();
        state.appended += 1;
        let timed = state.appended.is_multiple_of(TIMED_ONE_IN).then(now_ns);
        let now = state.paced_at;
        let is_due = state.agent.append(now, record);
        if matches!(record.entry, Entry::Output(_)) {
            self.pace_due.store(0, Ordering::Relaxed);
        } else if is_due {
            self.process_actions(&mut state);
        }
        if let Some(begin) = timed {
            self.times.recording_ns.add(TIMED_ONE_IN * (now_ns() - begin));
        }
    }

    /// Holds an output until it may leave.
    pub fn hold(self: &Arc<Self>, output: Output) {
        let begin = now_ns();
        let mut state = self.lock();
        state.gate.hold(output);
        self.times.held_ns.sub(begin);
        state.drop_released_outputs();
        if state.agent.release_limit(begin) > state.gate.released() {
            state.release_outputs();
        }
        // A guest with a backup is paced before it runs on, which processes the actions. A guest that is
        // alone is not.
        if state.alone {
            self.process_actions(&mut state);
        }
        if state.gate.recorded().is_multiple_of(TIMED_ONE_IN) {
            self.times.recording_ns.add(TIMED_ONE_IN * (now_ns() - begin));
        }
    }

    /// Backup: reports that `replayed` records have been replayed, up to position `at`, and waits for the
    /// next one. `None`: there are no more records.
    pub fn next_record(self: &Arc<Self>, replayed: u64, at: Position) -> Option<Record> {
        failpoint::wedge("guest");
        let mut state = self.lock();
        state.agent.handle(now_ns(), Event::Replayed { records: replayed, position: at });
        loop {
            let now = now_ns();
            state.read_link_if_due(now);
            state.agent.guest_loop_turned(now, at);
            self.process_actions(&mut state);
            if state.outcome.is_some() {
                return None;
            }
            match state.agent.next_record() {
                NextRecord::Record(record) => return Some(record),
                NextRecord::End => return None,
                // During a bulk transfer, being woken for each arrival costs both hosts more than reading
                // again soon.
                NextRecord::Wait => {
                    state = match state.socket_owner.guest_reads_at(now) {
                        Some(due) => {
                            self.wait_for_change(state, Duration::from_nanos(due.saturating_sub(now)))
                        }
                        None => self.release_socket_and_wait(state, TURN_INTERVAL),
                    }
                }
            }
        }
    }

    /// Reports that the guest's run is over.
    pub fn guest_ended(self: &Arc<Self>, reason: EndReason) {
        self.handle(Event::GuestEnded(reason));
    }

    /// Reports that the guest runs on, after this side went live.
    pub fn guest_runs_on(&self) {
        self.lock().history.guest_running(now_ns());
    }
}
