//! The thread that runs the guest and nothing else, so that it can be confined to almost nothing.

use std::sync::mpsc::{Sender, channel, sync_channel};

use crate::error::Error;

type Job = Box<dyn FnOnce() + Send>;

/// The guest's thread, which does one job after the other. It ends when this value is dropped.
pub struct GuestThread {
    jobs: Sender<Job>,
}

impl GuestThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> Result<GuestThread, Error> {
        let (jobs, queue) = channel::<Job>();
        let run = move || queue.into_iter().for_each(|job| job());
        let thread = std::thread::Builder::new().name("guest".into()).spawn(run);
        thread.map_err(Error::host("cannot start the guest's thread"))?;
        Ok(GuestThread { jobs })
    }

    /// Runs `work` on the guest's thread, and waits for its result.
    ///
    /// # Panics
    /// If `work` panics.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = sync_channel(1);
        // The result is always received, below; and if the thread is gone, so is `sender`, and receiving
        // fails.
        self.jobs.send(Box::new(move || drop(sender.send(work())))).ok();
        result.recv().expect("the guest's thread does not panic")
    }

    /// Lends `guest` to the guest's thread, which runs `work` on it; waits for the result, and returns both.
    ///
    /// # Panics
    /// If `work` panics.
    pub fn run_with<G: Send + 'static, T: Send + 'static>(
        &self,
        mut guest: G,
        work: impl FnOnce(&mut G) -> T + Send + 'static,
    ) -> (T, G) {
        self.run(move || (work(&mut guest), guest))
    }
}
