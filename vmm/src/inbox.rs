//! How inputs get from other threads to the guest's: a bounded queue for each origin, a kick for a guest that
//! runs and a wake for one that sleeps.
//!
//! Each origin has a queue of its own, so that frames that the guest has no buffers for hold up no disk completion.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use entry::{Console, Input};

use crate::devices::serial;
use crate::vcpu::Kick;

/// Where an input comes from; also the order in which they are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The disk in a slot.
    Disk(u8),
    /// A console.
    Console(Console),
    /// The network device in a slot.
    Net(u8),
}

#[derive(Default)]
struct Queues {
    /// Sorted by origin.
    queues: Vec<(Origin, VecDeque<Input>)>,
    stop: bool,
    /// Somebody sleeps in [`Inbox::wait`].
    sleeping: bool,
    /// Senders that wait for room.
    senders: usize,
    /// Something came since the last [`Inbox::take`], and the guest's thread was told of it.
    news: bool,
}

struct Shared {
    state: Mutex<Queues>,
    /// For the guest's thread.
    arrived: Condvar,
    /// For senders.
    room: Condvar,
    kick: Arc<dyn Kick>,
    capacity: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, mut state: MutexGuard<'_, Queues>) {
        state.news = true;
        let sleeping = state.sleeping;
        drop(state);
        if sleeping {
            self.arrived.notify_one();
        } else {
            self.kick.kick();
        }
    }
}

/// The guest thread's end.
pub struct Inbox(Arc<Shared>);

/// A sender's end.
#[derive(Clone)]
pub struct InboxSender(Arc<Shared>);

/// The run is over; nobody takes inputs any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's loop is gone")]
pub struct Closed;

impl Inbox {
    /// An inbox that holds `capacity` inputs of each origin and kicks `kick`.
    pub fn new(kick: Arc<dyn Kick>, capacity: usize) -> (Inbox, InboxSender) {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            arrived: Condvar::new(),
            room: Condvar::new(),
            kick,
            capacity: capacity.max(1),
        });
        (Inbox(shared.clone()), InboxSender(shared))
    }

    /// The first input, in the order of origins, that the machine `takes` now.
    pub fn take(&self, mut takes: impl FnMut(&Input) -> bool) -> Option<Input> {
        let mut state = self.0.lock();
        state.news = false;
        let queue = state.queues.iter_mut().map(|(_, queue)| queue);
        let input =
            queue.filter(|queue| queue.front().is_some_and(&mut takes)).find_map(VecDeque::pop_front)?;
        let awaited = state.senders > 0;
        drop(state);
        if awaited {
            self.0.room.notify_all();
        }
        Some(input)
    }

    /// Somebody asked the run to stop.
    pub fn stop_requested(&self) -> bool {
        self.0.lock().stop
    }

    /// Sleeps until something arrives, or for as long. What arrived since the last [`Inbox::take`] counts.
    pub fn wait(&self, timeout: Option<Duration>) {
        let mut state = self.0.lock();
        if state.news || state.stop {
            return;
        }
        state.sleeping = true;
        let idle = |state: &mut Queues| !state.news && !state.stop;
        let mut state = match timeout {
            Some(timeout) => {
                let woken = self.0.arrived.wait_timeout_while(state, timeout, idle);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.0.arrived.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner),
        };
        state.sleeping = false;
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.0.lock().stop = true;
        self.0.room.notify_all();
    }
}

impl InboxSender {
    /// Sends an input; waits while its origin's queue is full.
    pub fn send(&self, origin: Origin, input: Input) -> Result<(), Closed> {
        let mut state = self.0.lock();
        loop {
            if state.stop {
                return Err(Closed);
            }
            let at = match state.queues.binary_search_by_key(&origin, |(origin, _)| *origin) {
                Ok(at) => at,
                Err(at) => {
                    state.queues.insert(at, (origin, VecDeque::new()));
                    at
                }
            };
            if state.queues[at].1.len() < self.0.capacity {
                state.queues[at].1.push_back(input);
                // Who has not looked since the last news will find this too.
                if !state.news {
                    self.0.notify(state);
                }
                return Ok(());
            }
            state.senders += 1;
            state = self.0.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.senders -= 1;
        }
    }

    /// Sends typed bytes in pieces that a console takes.
    pub fn type_text(&self, console: Console, text: &[u8]) -> Result<(), Closed> {
        for bytes in text.chunks(serial::FIFO) {
            self.send(Origin::Console(console), Input::Console { console, bytes: bytes.to_vec() })?;
        }
        Ok(())
    }

    /// Asks the run to stop.
    pub fn stop(&self) {
        let mut state = self.0.lock();
        state.stop = true;
        self.0.notify(state);
        self.0.room.notify_all();
    }

    /// Makes the guest's loop look around, without an input.
    pub fn nudge(&self) {
        self.0.notify(self.0.lock());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Kicks(AtomicUsize);

    impl Kick for Kicks {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn frame(n: u8) -> Input {
        Input::Frame { slot: 0, bytes: vec![n] }
    }

    fn done(id: u64) -> Input {
        Input::DiskDone { slot: 1, id, result: entry::DiskResult::Done }
    }

    #[test]
    fn an_origin_that_must_wait_holds_up_no_other() {
        let kicks = Arc::new(Kicks::default());
        let (inbox, sender) = Inbox::new(kicks.clone(), 8);
        sender.send(Origin::Net(0), frame(1)).unwrap();
        sender.send(Origin::Net(0), frame(2)).unwrap();
        sender.send(Origin::Disk(1), done(1)).unwrap();
        assert_eq!(kicks.0.load(Ordering::Relaxed), 1, "one kick for all that nobody has looked at");
        let no_frames = |input: &Input| !matches!(input, Input::Frame { .. });
        assert_eq!(inbox.take(no_frames), Some(done(1)));
        assert_eq!(inbox.take(no_frames), None);
        assert_eq!(inbox.take(|_| true), Some(frame(1)));
        assert_eq!(inbox.take(|_| true), Some(frame(2)));
    }

    #[test]
    fn a_full_queue_makes_its_sender_wait_and_the_end_releases_it() {
        let (inbox, sender) = Inbox::new(Arc::new(Kicks::default()), 1);
        sender.send(Origin::Net(0), frame(1)).unwrap();
        let result = std::thread::scope(|threads| {
            let waiting = threads.spawn(|| {
                sender.send(Origin::Net(0), frame(2))?;
                sender.send(Origin::Net(0), frame(3))
            });
            while inbox.take(|_| true) != Some(frame(2)) {}
            drop(inbox);
            waiting.join().unwrap()
        });
        // The third was queued before the end or refused by it.
        assert!(matches!(result, Ok(()) | Err(Closed)));
        assert_eq!(sender.send(Origin::Net(0), frame(4)), Err(Closed));
    }

    #[test]
    fn news_before_the_wait_are_not_slept_over() {
        let (inbox, sender) = Inbox::new(Arc::new(Kicks::default()), 1);
        sender.nudge();
        inbox.wait(None);
        sender.stop();
        inbox.take(|_| true);
        inbox.wait(None);
        assert!(inbox.stop_requested());
    }

    #[test]
    fn typed_text_comes_in_pieces_that_fit() {
        let (inbox, sender) = Inbox::new(Arc::new(Kicks::default()), 4);
        sender.type_text(Console::Serial, &[b'x'; 100]).unwrap();
        let mut sizes = Vec::new();
        while let Some(Input::Console { bytes, .. }) = inbox.take(|_| true) {
            sizes.push(bytes.len());
        }
        assert_eq!(sizes, [64, 36]);
    }
}
