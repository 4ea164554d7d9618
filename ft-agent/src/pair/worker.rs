//! A thread that does tasks for other threads, one after the other: tasks that take long, or that a confined
//! thread may not do itself.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::error::Error;

type Task = Box<dyn FnOnce() + Send>;

/// The thread and its queue of tasks.
pub struct Worker {
    queue: Sender<Task>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> Result<Worker, Error> {
        let (queue, tasks) = channel::<Task>();
        let run = move || tasks.into_iter().for_each(|task| task());
        let thread = std::thread::Builder::new().name("worker".into()).spawn(run);
        Ok(Worker { queue, thread: thread.map_err(Error::host("cannot start the worker thread"))? })
    }

    /// Adds a task to the queue, and does not wait for it.
    pub fn submit(&self, task: impl FnOnce() + Send + 'static) {
        // Sending cannot fail: the thread lives as long as this value.
        self.queue.send(Box::new(task)).ok();
    }

    /// Waits until all tasks are done, and ends the thread.
    pub fn join(self) {
        drop(self.queue);
        // No task panics; and if one did, there would be nothing left to do about it here.
        self.thread.join().ok();
    }
}
