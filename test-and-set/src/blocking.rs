//! A store for callers that are plain threads: the client runs on its own thread, and a call waits or takes a callback.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::names::{Generation, Incarnation, KeyId, PartyName, VmName};
use crate::record::{Applied, Members, Verdict, VmRecord};
use crate::store::{StoreError, TestAndSet};

/// How long after its deadline a call may return at the latest.
const GRACE: Duration = Duration::from_millis(250);

/// A store without async. Clones share one client and its open connection; dropping the last one ends the client's thread.
#[derive(Clone)]
pub struct BlockingStore {
    store: Arc<dyn TestAndSet>,
    runtime: Arc<ClientThread>,
}

struct ClientThread {
    handle: tokio::runtime::Handle,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Drop for ClientThread {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // An error means that the thread has already ended.
            stop.send(()).ok();
        }
    }
}

impl BlockingStore {
    /// Makes a client for the store at this URL and starts to connect, without waiting for the connection.
    ///
    /// # Errors
    /// The URL or the keys are wrong, or the thread cannot be started.
    pub fn connect(url: &str) -> Result<Self, StoreError> {
        Self::connect_to(url.parse()?)
    }

    pub(crate) fn connect_to(url: crate::url::StoreUrl) -> Result<Self, StoreError> {
        Self::start(move || crate::connect::connect(&url))
    }

    /// Runs a task on the client's thread, which then lives until the task ends.
    pub(crate) fn spawn<F: Future<Output = ()> + Send + 'static>(
        self,
        task: impl FnOnce(Arc<dyn TestAndSet>) -> F + Send + 'static,
    ) {
        let handle = self.runtime.handle.clone();
        handle.spawn(async move {
            task(self.store.clone()).await;
            drop(self);
        });
    }

    /// Wraps any store, for example a [`crate::fake::FakeStore`] that several agents of a test share.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn over(store: Arc<dyn TestAndSet>) -> Result<Self, StoreError> {
        Self::start(move || Ok(store))
    }

    pub(crate) fn start(
        make: impl FnOnce() -> Result<Arc<dyn TestAndSet>, StoreError> + Send + 'static,
    ) -> Result<Self, StoreError> {
        let (made, wait) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(made.send(Err(StoreError::Thread(error)))),
            };
            // A failure only means that verdicts take longer on a busy machine.
            crate::time_slice::shorten().ok();
            runtime.block_on(async {
                let handle = tokio::runtime::Handle::current();
                // If the caller is gone, `stopped` is closed, too, and the thread ends.
                made.send(make().map(|store| (store, handle))).ok();
                stopped.await.ok();
            });
        };
        std::thread::Builder::new().name("store-client".into()).spawn(run).map_err(StoreError::Thread)?;
        let (store, handle) = wait.recv().map_err(|_| StoreError::Stopped)??;
        Ok(Self { store, runtime: Arc::new(ClientThread { handle, stop: Some(stop) }) })
    }

    /// Takes a generation and passes the verdict to `tell` on the client's thread: for an event loop that must not wait.
    pub fn begin_take(
        &self,
        vm: VmName,
        generation: Generation,
        who: Incarnation,
        patience: Duration,
        tell: impl FnOnce(Verdict<StoreError>) + Send + 'static,
    ) {
        let (store, deadline) = (self.store.clone(), Instant::now() + patience);
        self.runtime.handle.spawn(async move { tell(store.take(&vm, generation, who, deadline).await) });
    }

    /// Reads a VM's record and passes it to `tell` on the client's thread. It waits for no other call, and none waits for it.
    pub fn begin_get(
        &self,
        vm: VmName,
        patience: Duration,
        tell: impl FnOnce(Result<Option<VmRecord>, StoreError>) + Send + 'static,
    ) {
        let (store, deadline) = (self.store.clone(), Instant::now() + patience);
        self.runtime.handle.spawn(async move { tell(store.get(&vm, deadline).await) });
    }

    /// Takes a generation, and waits at most `patience` for the verdict.
    pub fn take(
        &self,
        vm: &VmName,
        generation: Generation,
        who: Incarnation,
        patience: Duration,
    ) -> Verdict<StoreError> {
        let vm = vm.clone();
        self.wait(patience, move |store, deadline| async move {
            Ok(store.take(&vm, generation, who, deadline).await)
        })
        .unwrap_or_else(Verdict::Unknown)
    }

    /// Opens a generation, as [`TestAndSet::open`] does.
    pub fn open(
        &self,
        vm: &VmName,
        generation: Generation,
        members: &Members,
        patience: Duration,
    ) -> Result<Applied, StoreError> {
        let (vm, members) = (vm.clone(), members.clone());
        self.wait(patience, move |store, deadline| async move {
            store.open(&vm, generation, &members, deadline).await
        })
    }

    /// The record of a VM, forgotten or not.
    pub fn get(&self, vm: &VmName, patience: Duration) -> Result<Option<VmRecord>, StoreError> {
        let vm = vm.clone();
        self.wait(patience, move |store, deadline| async move { store.get(&vm, deadline).await })
    }

    /// The host that has this key, as [`TestAndSet::host_of`] returns it.
    pub fn host_of(&self, key: KeyId, patience: Duration) -> Result<Option<PartyName>, StoreError> {
        self.wait(patience, move |store, deadline| async move { store.host_of(key, deadline).await })
    }

    /// A page of the VMs, as [`TestAndSet::list`] returns it.
    pub fn list(
        &self,
        after: Option<&VmName>,
        patience: Duration,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        let after = after.cloned();
        self.wait(patience, move |store, deadline| async move { store.list(after.as_ref(), deadline).await })
    }

    /// Records that a VM has ended, as [`TestAndSet::end`] does.
    pub fn end(
        &self,
        vm: &VmName,
        generation: Generation,
        who: Incarnation,
        patience: Duration,
    ) -> Result<Applied, StoreError> {
        let vm = vm.clone();
        self.wait(
            patience,
            move |store, deadline| async move { store.end(&vm, generation, who, deadline).await },
        )
    }

    /// Forgets a VM, if this is its current generation. Only for operators.
    pub fn forget(
        &self,
        vm: &VmName,
        generation: Generation,
        patience: Duration,
    ) -> Result<Applied, StoreError> {
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
            // The caller may have stopped waiting.
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
