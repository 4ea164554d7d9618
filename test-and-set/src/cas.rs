//! The rule of [`crate::record`] over a store that only has compare-and-set: read, decide here, write if unchanged.

use std::time::{Duration, Instant};

use crate::names::VmName;
use crate::record::{self, Command, Record, Reply};
use crate::store::{NodeError, StoreError};

/// What a compare-and-set store must offer.
pub(crate) trait Registers: Sync {
    /// What a write is compared with; `Default` stands for "absent".
    type Revision: Default + Send + Sync;

    /// Reads a record. The read need not be fresh unless `fresh`: what is decided from it is compared before it is written.
    fn read(
        &self,
        vm: &VmName,
        fresh: bool,
    ) -> impl Future<Output = Result<(Option<Vec<u8>>, Self::Revision), CasError>> + Send;

    /// Writes a record if it still has this revision; `false` if it has not.
    fn write(
        &self,
        vm: &VmName,
        record: Vec<u8>,
        revision: Self::Revision,
    ) -> impl Future<Output = Result<bool, CasError>> + Send;
}

/// A failure of one step.
pub(crate) enum CasError {
    /// Try again, inside the deadline; the node that failed is named.
    Again(String, NodeError),
    /// Tell the caller.
    Tell(StoreError),
}

impl From<StoreError> for CasError {
    fn from(error: StoreError) -> Self {
        Self::Tell(error)
    }
}

/// First byte of a record in a foreign store: the version of its encoding.
const RECORD_VERSION: u8 = 1;

pub(crate) fn encode(record: &Record) -> Result<Vec<u8>, StoreError> {
    postcard::to_extend(record, vec![RECORD_VERSION]).map_err(StoreError::Encode)
}

pub(crate) fn decode(vm: &VmName, bytes: &[u8]) -> Result<Record, StoreError> {
    let foreign = |source| StoreError::Foreign { vm: vm.clone(), source };
    match bytes.split_first() {
        Some((&RECORD_VERSION, body)) => postcard::from_bytes(body).map_err(foreign),
        _ => Err(foreign(postcard::Error::DeserializeBadEncoding)),
    }
}

/// Repeats a step until it is answered, must be told, or the deadline has come.
pub(crate) async fn until<T, F: Future<Output = Result<T, CasError>>>(
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
            Ok(Err(CasError::Tell(error))) => return Err(error),
            Ok(Err(CasError::Again(node, error))) => nodes = vec![(node, error)],
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

/// Applies a command. Repeating after an unclear write is right: the repeat reads what the write did.
pub(crate) async fn command<R: Registers>(
    registers: &R,
    vm: &VmName,
    command: &Command,
    deadline: Instant,
) -> Result<Reply, StoreError> {
    until(deadline, || async {
        let mut fresh = false;
        loop {
            let (bytes, revision) = registers.read(vm, fresh).await?;
            let record = bytes.map(|bytes| decode(vm, &bytes)).transpose()?;
            match record::decide(record.as_ref(), command) {
                // An answer without a write is only as good as the read.
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

/// Reads a record.
pub(crate) async fn get<R: Registers>(
    registers: &R,
    vm: &VmName,
    deadline: Instant,
) -> Result<Option<Record>, StoreError> {
    until(deadline, || async {
        let (bytes, _) = registers.read(vm, true).await?;
        Ok(bytes.map(|bytes| decode(vm, &bytes)).transpose()?)
    })
    .await
}
