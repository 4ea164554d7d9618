//! A store for callers that are plain threads: the client runs on a thread of its own, and a call may wait or leave a callback.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::names::{Generation, Incarnation, VmName};
use crate::record::{Members, Record};
use crate::store::{Outcome, StoreError, TestAndSet, Verdict};

/// How much longer than its deadline a call may take to say that it has passed.
const GRACE: Duration = Duration::from_millis(250);

/// A store to be used without async. Clones share one client and its warm connection; the last one dropped ends its thread.
#[derive(Clone)]
pub struct Blocking {
    store: Arc<dyn TestAndSet>,
    runtime: Arc<OwnThread>,
}

struct OwnThread {
    handle: tokio::runtime::Handle,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Drop for OwnThread {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // If the thread has ended already there is nothing to stop.
            stop.send(()).ok();
        }
    }
}

impl Blocking {
    /// Makes a client for the store at this URL and begins to connect, without waiting for it.
    pub fn connect(url: &str) -> Result<Self, StoreError> {
        let url: crate::url::StoreUrl = url.parse()?;
        Self::start(move || crate::connect(&url))
    }

    /// Runs any store, as a [`crate::fake::FakeStore`] that several agents of a test share.
    pub fn over(store: Arc<dyn TestAndSet>) -> Result<Self, StoreError> {
        Self::start(move || Ok(store))
    }

    fn start(
        make: impl FnOnce() -> Result<Arc<dyn TestAndSet>, StoreError> + Send + 'static,
    ) -> Result<Self, StoreError> {
        let (made, wait) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(made.send(Err(StoreError::Thread(error)))),
            };
            // Without it a verdict takes longer on a busy machine, and that is all.
            crate::slice::shorten().ok();
            runtime.block_on(async {
                let handle = tokio::runtime::Handle::current();
                // Who asked may have gone; then `stopped` is closed, too.
                made.send(make().map(|store| (store, handle))).ok();
                stopped.await.ok();
            });
        };
        std::thread::Builder::new().name("store-client".into()).spawn(run).map_err(StoreError::Thread)?;
        let (store, handle) = wait.recv().map_err(|_| StoreError::Stopped)??;
        Ok(Self { store, runtime: Arc::new(OwnThread { handle, stop: Some(stop) }) })
    }

    /// Takes, and tells the verdict to `tell` on the client's thread: for an event loop that must not wait.
    pub fn begin_take(
        &self,
        vm: VmName,
        generation: Generation,
        who: Incarnation,
        patience: Duration,
        tell: impl FnOnce(Verdict) + Send + 'static,
    ) {
        let (store, deadline) = (self.store.clone(), Instant::now() + patience);
        self.runtime.handle.spawn(async move { tell(store.take(&vm, generation, who, deadline).await) });
    }

    /// Takes, and waits at most `patience` for the verdict.
    pub fn take(&self, vm: &VmName, generation: Generation, who: Incarnation, patience: Duration) -> Verdict {
        let vm = vm.clone();
        self.wait(patience, move |store, deadline| async move {
            Ok(store.take(&vm, generation, who, deadline).await)
        })
        .unwrap_or_else(Verdict::Unknown)
    }

    /// Opens a generation; see [`TestAndSet::open`].
    pub fn open(
        &self,
        vm: &VmName,
        generation: Generation,
        members: &Members,
        patience: Duration,
    ) -> Result<Outcome, StoreError> {
        let (vm, members) = (vm.clone(), members.clone());
        self.wait(patience, move |store, deadline| async move {
            store.open(&vm, generation, &members, deadline).await
        })
    }

    /// The record of a VM, forgotten or not.
    pub fn get(&self, vm: &VmName, patience: Duration) -> Result<Option<Record>, StoreError> {
        let vm = vm.clone();
        self.wait(patience, move |store, deadline| async move { store.get(&vm, deadline).await })
    }

    /// A page of the VMs; see [`TestAndSet::list`].
    pub fn list(
        &self,
        after: Option<&VmName>,
        patience: Duration,
    ) -> Result<Vec<(VmName, Record)>, StoreError> {
        let after = after.cloned();
        self.wait(patience, move |store, deadline| async move { store.list(after.as_ref(), deadline).await })
    }

    /// Forgets a VM whose last generation this is.
    pub fn forget(
        &self,
        vm: &VmName,
        generation: Generation,
        patience: Duration,
    ) -> Result<Outcome, StoreError> {
        let vm = vm.clone();
        self.wait(
            patience,
            move |store, deadline| async move { store.forget(&vm, generation, deadline).await },
        )
    }

    fn wait<T, F>(
        &self,
        patience: Duration,
        ask: impl FnOnce(Arc<dyn TestAndSet>, Instant) -> F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (tell, told) = mpsc::sync_channel(1);
        let asked = ask(self.store.clone(), Instant::now() + patience);
        self.runtime.handle.spawn(async move {
            // The asker may have gone after its patience.
            tell.send(asked.await).ok();
        });
        match told.recv_timeout(patience + GRACE) {
            Ok(answer) => answer,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(StoreError::NoAnswer { waited: patience + GRACE, nodes: vec![] })
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(StoreError::Stopped),
        }
    }
}
