//! How inputs get from other threads to the guest's thread: a bounded queue for each origin, a kick if the guest runs, and
//! a wake-up if its thread sleeps.
//!
//! Each origin has its own queue, so that frames for which the guest has no buffers do not hold up disk completions.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use entry::{Console, Input};

use crate::devices::serial;
use crate::vcpu::Kick;

/// Where an input comes from. Origins are polled in this order.
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
    /// The guest's thread sleeps in [`Inbox::wait`].
    sleeping: bool,
    /// Number of senders that wait for room.
    senders: usize,
    /// Something arrived since the last [`Inbox::take_first`], and the guest's thread was kicked or woken for it.
    has_news: bool,
}

struct InboxShared {
    state: Mutex<Queues>,
    /// The guest's thread waits on this one.
    arrived: Condvar,
    /// Senders wait on this one.
    room: Condvar,
    kick: Arc<dyn Kick>,
    capacity: usize,
}

impl InboxShared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, mut state: MutexGuard<'_, Queues>) {
        state.has_news = true;
        let sleeping = state.sleeping;
        drop(state);
        if sleeping {
            self.arrived.notify_one();
        } else {
            self.kick.kick();
        }
    }
}

/// The receiving end, for the guest's thread.
pub struct Inbox(Arc<InboxShared>);

/// A sending end, for any other thread.
#[derive(Clone)]
pub struct InboxSender(Arc<InboxShared>);

/// The run is over: no more inputs are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest no longer runs, and takes no inputs")]
pub struct Closed;

impl Inbox {
    /// An inbox that holds up to `capacity` inputs of each origin, and uses `kick` to stop the guest for them.
    pub fn new(kick: Arc<dyn Kick>, capacity: usize) -> (Inbox, InboxSender) {
        let shared = Arc::new(InboxShared {
            state: Mutex::default(),
            arrived: Condvar::new(),
            room: Condvar::new(),
            kick,
            capacity: capacity.max(1),
        });
        (Inbox(shared.clone()), InboxSender(shared))
    }

    /// Takes the first input, in the order of origins, that the machine `takes` now.
    pub fn take_first(&self, mut takes: impl FnMut(&Input) -> bool) -> Option<Input> {
        let mut state = self.0.lock();
        state.has_news = false;
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

    /// Whether the run was asked to stop.
    pub fn stop_requested(&self) -> bool {
        self.0.lock().stop
    }

    /// Sleeps until something arrives, at most for `timeout`. Returns at once if something arrived since the last
    /// [`Inbox::take_first`].
    pub fn wait(&self, timeout: Option<Duration>) {
        let mut state = self.0.lock();
        if state.has_news || state.stop {
            return;
        }
        state.sleeping = true;
        let idle = |state: &mut Queues| !state.has_news && !state.stop;
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
    /// Sends an input; waits while the queue of its origin is full.
    ///
    /// # Errors
    /// The run is over.
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
                // If the guest's thread has not looked since the last notification, it will find this input too.
                if !state.has_news {
                    self.0.notify(state);
                }
                return Ok(());
            }
            state.senders += 1;
            state = self.0.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.senders -= 1;
        }
    }

    /// Sends typed bytes, in pieces that a console has room for.
    ///
    /// # Errors
    /// The run is over.
    pub fn type_text(&self, console: Console, text: &[u8]) -> Result<(), Closed> {
        for bytes in text.chunks(serial::FIFO) {
            self.send(Origin::Console(console), Input::Console { console, bytes: bytes.to_vec() })?;
        }
        Ok(())
    }

    /// Asks the run to stop, and releases senders that wait.
    pub fn stop(&self) {
        let mut state = self.0.lock();
        state.stop = true;
        self.0.notify(state);
        self.0.room.notify_all();
    }

    /// Makes the guest's loop ask its source again, without an input.
    pub fn wake(&self) {
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
    fn an_origin_that_must_wait_does_not_hold_up_another() {
        let kicks = Arc::new(Kicks::default());
        let (inbox, sender) = Inbox::new(kicks.clone(), 8);
        sender.send(Origin::Net(0), frame(1)).unwrap();
        sender.send(Origin::Net(0), frame(2)).unwrap();
        sender.send(Origin::Disk(1), done(1)).unwrap();
        assert_eq!(
            kicks.0.load(Ordering::Relaxed),
            1,
            "one kick for all inputs that the guest has not looked at"
        );
        let no_frames = |input: &Input| !matches!(input, Input::Frame { .. });
        assert_eq!(inbox.take_first(no_frames), Some(done(1)));
        assert_eq!(inbox.take_first(no_frames), None);
        assert_eq!(inbox.take_first(|_| true), Some(frame(1)));
        assert_eq!(inbox.take_first(|_| true), Some(frame(2)));
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
            while inbox.take_first(|_| true) != Some(frame(2)) {}
            drop(inbox);
            waiting.join().unwrap()
        });
        // The third input was queued before the inbox was dropped, or was refused.
        assert!(matches!(result, Ok(()) | Err(Closed)));
        assert_eq!(sender.send(Origin::Net(0), frame(4)), Err(Closed));
    }

    #[test]
    fn what_arrived_before_the_wait_ends_it_at_once() {
        let (inbox, sender) = Inbox::new(Arc::new(Kicks::default()), 1);
        sender.wake();
        inbox.wait(None);
        sender.stop();
        inbox.take_first(|_| true);
        inbox.wait(None);
        assert!(inbox.stop_requested());
    }

    #[test]
    fn typed_text_comes_in_pieces_that_fit() {
        let (inbox, sender) = Inbox::new(Arc::new(Kicks::default()), 4);
        sender.type_text(Console::Serial, &[b'x'; 100]).unwrap();
        let mut sizes = Vec::new();
        while let Some(Input::Console { bytes, .. }) = inbox.take_first(|_| true) {
            sizes.push(bytes.len());
        }
        assert_eq!(sizes, [64, 36]);
    }
}
