//! The client of `etcd://`: one key for each VM, changed by transactions that compare its revision; etcd's locks are not used.
//!
//! Of etcd's protocol (version 3, gRPC) this needs one request for reading and one for transactions. The messages here have only
//! the fields that are used; protobuf skips the others.

use std::path::Path;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use prost::{Message, Oneof};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::cas::{self, CasError, CasStore};
use crate::names::VmName;
use crate::record::{Command, CommandReply, VmPhase, VmRecord};
use crate::store::{NodeError, PAGE_RECORDS_MAX, StoreError, TestAndSet};

/// How long one request may take before it is repeated.
const REQUEST_PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    limit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
}

/// The condition that a key's modification revision equals a number; `EQUAL` and `MOD` are values of etcd's protocol.
#[derive(Clone, PartialEq, Message)]
struct Compare {
    #[prost(int32, tag = "1")]
    result: i32,
    #[prost(int32, tag = "2")]
    target: i32,
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
    #[prost(int64, optional, tag = "6")]
    mod_revision: Option<i64>,
}

const EQUAL: i32 = 0;
const MOD: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Oneof)]
enum EtcdOperation {
    #[prost(message, tag = "2")]
    Put(PutRequest),
}

#[derive(Clone, PartialEq, Message)]
struct RequestOp {
    #[prost(oneof = "EtcdOperation", tags = "2")]
    request: Option<EtcdOperation>,
}

#[derive(Clone, PartialEq, Message)]
struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    success: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
struct TxnResponse {
    #[prost(bool, tag = "2")]
    succeeded: bool,
}

/// A client of etcd.
pub struct EtcdStore {
    channel: Channel,
    nodes: String,
    prefix: String,
}

impl EtcdStore {
    /// Makes a client, which connects with the first request. Must be called in a tokio runtime.
    pub fn new(nodes: &[String], prefix: &str, keys: Option<&Path>) -> Result<Self, StoreError> {
        let tls = keys.map(tls).transpose()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let endpoints = nodes.iter().map(|node| {
            let endpoint = Endpoint::from_shared(format!("{scheme}://{node}"))?;
            let endpoint =
                endpoint.tcp_nodelay(true).connect_timeout(REQUEST_PATIENCE).timeout(REQUEST_PATIENCE);
            match &tls {
                Some(tls) => endpoint.tls_config(tls.clone()),
                None => Ok(endpoint),
            }
        });
        let failed = |error| StoreError::Unusable(vec![(nodes.join(","), NodeError::EtcdTransport(error))]);
        let endpoints = endpoints.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let channel = Channel::balance_list(endpoints.into_iter());
        Ok(Self { channel, nodes: nodes.join(","), prefix: prefix.into() })
    }

    fn key(&self, vm: &VmName) -> Vec<u8> {
        format!("{}/vm/{vm}", self.prefix).into_bytes()
    }

    /// Sets a VM's key in one transaction, if it still has this modification revision (0: if it does not exist). Returns `false` if
    /// it has another one.
    pub async fn compare_and_put(
        &self,
        vm: &VmName,
        value: Vec<u8>,
        revision: i64,
        deadline: Instant,
    ) -> Result<bool, StoreError> {
        cas::retry_until(deadline, || self.write(vm, value.clone(), revision)).await
    }

    async fn request<Q, A>(&self, path: &'static str, request: Q) -> Result<A, CasError>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let again = |error| CasError::Retry(self.nodes.clone(), error);
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| again(error.into()))?;
        let codec = tonic_prost::ProstCodec::default();
        let answer = grpc.unary(tonic::Request::new(request), PathAndQuery::from_static(path), codec).await;
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status)
                if status.code() == tonic::Code::ResourceExhausted && status.message().contains("space") =>
            {
                Err(CasError::Report(StoreError::DiskFull(self.nodes.clone())))
            }
            Err(status) if is_lasting(status.code()) => {
                let error = NodeError::Etcd(Box::new(status));
                Err(CasError::Report(StoreError::Unusable(vec![(self.nodes.clone(), error)])))
            }
            Err(status) => Err(again(NodeError::Etcd(Box::new(status)))),
        }
    }
}

/// Whether etcd will answer in the same way until an operator corrects something.
fn is_lasting(code: tonic::Code) -> bool {
    use tonic::Code::{InvalidArgument, PermissionDenied, Unauthenticated, Unimplemented};
    matches!(code, InvalidArgument | PermissionDenied | Unauthenticated | Unimplemented)
}

fn tls(dir: &Path) -> Result<ClientTlsConfig, StoreError> {
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read(&path).map_err(|source| StoreError::Keys(crate::keys::KeysError::Io { path, source }))
    };
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("ca.crt")?));
    if !dir.join("own.crt").exists() {
        return Ok(config);
    }
    Ok(config.identity(Identity::from_pem(read("own.crt")?, read("own.key")?)))
}

impl CasStore for EtcdStore {
    /// The key's modification revision; 0 if it does not exist.
    type Revision = i64;

    // A range request without `serializable` is linearizable: every read is fresh.
    async fn read(&self, vm: &VmName, _fresh: bool) -> Result<(Option<Vec<u8>>, i64), CasError> {
        let request = RangeRequest { key: self.key(vm), ..Default::default() };
        let mut answer: RangeResponse = self.request("/etcdserverpb.KV/Range", request).await?;
        Ok(answer.kvs.pop().map_or((None, 0), |kv| (Some(kv.value), kv.mod_revision)))
    }

    async fn write(&self, vm: &VmName, record: Vec<u8>, revision: i64) -> Result<bool, CasError> {
        let key = self.key(vm);
        let unchanged =
            Compare { result: EQUAL, target: MOD, key: key.clone(), mod_revision: Some(revision) };
        let put = RequestOp { request: Some(EtcdOperation::Put(PutRequest { key, value: record })) };
        let request = TxnRequest { compare: vec![unchanged], success: vec![put] };
        let answer: TxnResponse = self.request("/etcdserverpb.KV/Txn", request).await?;
        Ok(answer.succeeded)
    }
}

#[async_trait]
impl TestAndSet for EtcdStore {
    async fn command(
        &self,
        vm: &VmName,
        command: &Command,
        deadline: Instant,
    ) -> Result<CommandReply, StoreError> {
        cas::command(self, vm, command, deadline).await
    }

    async fn get(&self, vm: &VmName, deadline: Instant) -> Result<Option<VmRecord>, StoreError> {
        cas::get(self, vm, deadline).await
    }

    async fn list(
        &self,
        after: Option<&VmName>,
        deadline: Instant,
    ) -> Result<Vec<(VmName, VmRecord)>, StoreError> {
        let base = format!("{}/vm/", self.prefix);
        // '0' is the byte after '/', so this key follows all keys below the prefix.
        let end = format!("{}/vm0", self.prefix).into_bytes();
        let mut from = after.map_or(base.clone().into_bytes(), |vm| [self.key(vm), vec![0]].concat());
        // A page of only forgotten VMs must not be returned empty, because an empty page means the end.
        loop {
            let request =
                RangeRequest { key: from.clone(), range_end: end.clone(), limit: PAGE_RECORDS_MAX as i64 };
            let answer: RangeResponse =
                cas::retry_until(deadline, || self.request("/etcdserverpb.KV/Range", request.clone()))
                    .await?;
            let Some(last) = answer.kvs.last() else { return Ok(vec![]) };
            from = [&last.key[..], &[0]].concat();
            let mut page = vec![];
            for kv in answer.kvs {
                let name =
                    kv.key.strip_prefix(base.as_bytes()).and_then(|name| std::str::from_utf8(name).ok());
                let Some(vm) = name.and_then(|name| name.parse::<VmName>().ok()) else { continue };
                let record = cas::decode(&vm, &kv.value)?;
                if record.phase != VmPhase::Forgotten {
                    page.push((vm, record));
                }
            }
            if !page.is_empty() {
                return Ok(page);
            }
        }
    }
}
