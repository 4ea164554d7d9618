//! A thread that does for others, one after the other, what takes long or what they may not.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::error::Error;

type Errand = Box<dyn FnOnce() + Send>;

/// See the module.
pub struct Errands {
    queue: Sender<Errand>,
    thread: JoinHandle<()>,
}

impl Errands {
    /// Starts the thread.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start() -> Result<Errands, Error> {
        let (queue, errands) = channel::<Errand>();
        let run = move || errands.into_iter().for_each(|errand| errand());
        let thread = std::thread::Builder::new().name("errands".into()).spawn(run);
        Ok(Errands { queue, thread: thread.map_err(Error::host("thread"))? })
    }

    /// Does this when it is its turn.
    pub fn send(&self, errand: impl FnOnce() + Send + 'static) {
        // The thread ends only with this value.
        self.queue.send(Box::new(errand)).ok();
    }

    /// Waits until everything is done.
    pub fn finish(self) {
        drop(self.queue);
        // An errand does not panic, and if it did there would be nothing left to do.
        self.thread.join().ok();
    }
}
