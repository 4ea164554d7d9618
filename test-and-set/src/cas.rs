//! The rule of [`crate::record`] on a store that only offers compare-and-set: read the record, decide here, write if unchanged.

use std::time::{Duration, Instant};

use async_trait::async_trait;

use crate::names::VmName;
use crate::record::{self, Command, CommandReply, VmRecord};
use crate::store::{NodeError, StoreError, TestAndSet};

/// What a compare-and-set store has to offer: one record for each VM.
pub(crate) trait CasStore: Sync {
    /// The revision of a record, with which a write is compared; `Default` stands for "absent".
    type Revision: Default + Send + Sync;

    /// Reads a record. Unless `fresh` is set the result may be old: a write based on it is compared with the current revision.
    fn read(
        &self,
        vm: &VmName,
        fresh: bool,
    ) -> impl Future<Output = Result<(Option<Vec<u8>>, Self::Revision), CasError>> + Send;

    /// Writes a record if it still has this revision; returns `false` if it has another.
    fn write(
        &self,
        vm: &VmName,
        record: Vec<u8>,
        revision: Self::Revision,
    ) -> impl Future<Output = Result<bool, CasError>> + Send;

    /// A page of records, as [`TestAndSet::list`] returns it.
    fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> impl Future<Output = Result<Vec<(VmName, VmRecord)>, StoreError>> + Send;
}

#[async_trait]
impl<S: CasStore + Send> TestAndSet for S {
    async fn command(
        &self,
        vm: &VmName,
        command: &Command,
        deadline: Instant,
    ) -> Result<CommandReply, StoreError> {
        apply(self, vm, command, deadline).await
    }

    async fn get(&self, vm: &VmName, deadline: Instant) -> Result<Option<VmRecord>, StoreError> {
        retry_until(deadline, || async {
            let (bytes, _) = self.read(vm, true).await?;
            Ok(bytes.map(|bytes| decode(vm, &bytes)).transpose()?)
        })
        .await
    }

    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        CasStore::list(self, after, deadline).await
    }
}

/// Why an attempt failed.
pub(crate) enum CasError {
    /// Try again until the deadline. Names the nodes that failed.
    Retry(Vec<(String, NodeError)>),
    /// Report it to the caller.
    Report(StoreError),
}

impl From<StoreError> for CasError {
    fn from(error: StoreError) -> Self {
        Self::Report(error)
    }
}

/// The first byte of a record in etcd or ZooKeeper: the version of its encoding.
const RECORD_VERSION: u8 = 1;

pub(crate) fn encode(record: &VmRecord) -> Result<Vec<u8>, StoreError> {
    postcard::to_extend(record, vec![RECORD_VERSION]).map_err(StoreError::Encode)
}

pub(crate) fn decode(vm: &VmName, bytes: &[u8]) -> Result<VmRecord, StoreError> {
    let foreign = |source| StoreError::Foreign { vm: vm.clone(), source };
    match bytes.split_first() {
        Some((&RECORD_VERSION, body)) => postcard::from_bytes(body).map_err(foreign),
        _ => Err(foreign(postcard::Error::DeserializeBadEncoding)),
    }
}

/// Repeats an attempt until it succeeds, its failure has to be reported, or the deadline has passed.
pub(crate) async fn retry_until<T, F: Future<Output = Result<T, CasError>>>(
    deadline: Instant,
    mut step: impl FnMut() -> F,
) -> Result<T, StoreError> {
    let begun = Instant::now();
    let mut nodes = vec![];
    let mut pause = Duration::from_millis(5);
    loop {
        let step = tokio::time::timeout_at(deadline.into(), step()).await;
        match step {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(CasError::Report(error))) => return Err(error),
            Ok(Err(CasError::Retry(failed))) => nodes = failed,
            Err(_) if nodes.is_empty() => nodes = vec![("the store".into(), NodeError::Silent)],
            Err(_) => {}
        }
        if Instant::now() + pause >= deadline {
            return Err(StoreError::NoAnswer { waited: begun.elapsed(), nodes });
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(Duration::from_millis(160));
    }
}

/// Applies a command. After a write with an unknown outcome it is safe to start again, because the next read shows what the
/// write did.
async fn apply<R: CasStore>(
    registers: &R,
    vm: &VmName,
    command: &Command,
    deadline: Instant,
) -> Result<CommandReply, StoreError> {
    retry_until(deadline, || async {
        let mut fresh = false;
        loop {
            let (bytes, revision) = registers.read(vm, fresh).await?;
            let record = bytes.map(|bytes| decode(vm, &bytes)).transpose()?;
            match record::decide(record.as_ref(), command, None) {
                // A reply without a write is correct only if the read was fresh.
                (None, reply) if fresh => return Ok(reply),
                (None, _) => fresh = true,
                (Some(new), reply) => {
                    if registers.write(vm, encode(&new)?, revision).await? {
                        return Ok(reply);
                    }
                }
            }
        }
    })
    .await
}
