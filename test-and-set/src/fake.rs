//! A store in memory, for tests of code that uses a store.

use std::sync::Mutex;
use std::time::Instant;

use async_trait::async_trait;

use crate::names::VmName;
use crate::record::{Command, CommandReply, VmRecord};
use crate::state::StoreState;
use crate::store::{PAGE_RECORDS_MAX, StoreError, TestAndSet};

/// A store in this process's memory. Share it with an `Arc`.
#[derive(Debug, Default)]
pub struct FakeStore {
    state: Mutex<StoreState>,
}

impl FakeStore {
    fn state(&self) -> std::sync::MutexGuard<'_, StoreState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[async_trait]
impl TestAndSet for FakeStore {
    async fn command(&self, vm: &VmName, command: &Command, _: Instant) -> Result<CommandReply, StoreError> {
        Ok(self.state().apply(vm, command, None))
    }

    async fn get(&self, vm: &VmName, _: Instant) -> Result<Option<VmRecord>, StoreError> {
        Ok(self.state().get(vm).cloned())
    }

    async fn list(&self, after: Option<&VmName>, _: Instant) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        let state = self.state();
        let page = state.list(after).take(PAGE_RECORDS_MAX);
        Ok(page.map(|(vm, record)| (vm.clone(), record.clone())).collect())
    }
}
