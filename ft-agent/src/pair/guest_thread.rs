//! The thread that runs the guest, and nothing else, so that it can be confined to nearly nothing.

use std::sync::mpsc::{Sender, channel, sync_channel};

use crate::error::Error;

type Job = Box<dyn FnOnce() + Send>;

/// See the module. The thread ends with this value.
pub struct GuestThread {
    jobs: Sender<Job>,
}

impl GuestThread {
    /// Starts it.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start() -> Result<GuestThread, Error> {
        let (jobs, todo) = channel::<Job>();
        let run = move || todo.into_iter().for_each(|job| job());
        std::thread::Builder::new().name("guest".into()).spawn(run).map_err(Error::host("thread"))?;
        Ok(GuestThread { jobs })
    }

    /// Does a piece of work there, and waits for it.
    ///
    /// # Panics
    /// When the work does.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = sync_channel(1);
        // Who asks is waiting; if the thread has gone, so has `tell`.
        self.jobs.send(Box::new(move || drop(tell.send(work())))).ok();
        told.recv().expect("the guest's thread does not panic")
    }

    /// The same with something that is lent to it.
    ///
    /// # Panics
    /// As [`GuestThread::run`].
    pub fn with<G: Send + 'static, T: Send + 'static>(
        &self,
        mut guest: G,
        work: impl FnOnce(&mut G) -> T + Send + 'static,
    ) -> (T, G) {
        self.run(move || (work(&mut guest), guest))
    }
}
