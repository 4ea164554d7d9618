//! The client of `etcd://`: one key for each VM, changed by transactions that compare its revision; etcd's locks are not used.
//!
//! Of etcd's protocol (version 3, gRPC) this needs one request for reading and one for transactions. The messages here have only
//! the fields that are used; protobuf skips the others.

use std::time::{Duration, Instant};

use prost::{Message, Oneof};
use tokio::sync::Mutex;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::cas::{self, CasError, CasStore};
use crate::client_keys::ClientKeys;
use crate::names::VmName;
use crate::record::{VmPhase, VmRecord};
use crate::store::{NodeError, PAGE_RECORDS_MAX, StoreError};

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

#[derive(Clone, PartialEq, Message)]
struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    password: String,
}

#[derive(Clone, PartialEq, Message)]
struct AuthenticateResponse {
    #[prost(string, tag = "2")]
    token: String,
}

/// A client of etcd.
pub struct EtcdStore {
    channel: Channel,
    nodes: String,
    prefix: String,
    keys: ClientKeys,
    /// The token for the user, once etcd has given one.
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

impl EtcdStore {
    /// Makes a client, which connects with the first request. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// The keys cannot be used.
    pub fn new(nodes: &[String], prefix: &str, keys: ClientKeys) -> Result<Self, StoreError> {
        let tls = tls(&keys)?;
        keys.user()?;
        keys.warn(&format!("etcd://{}", nodes.join(",")), true);
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
        Ok(Self { channel, nodes: nodes.join(","), prefix: prefix.into(), keys, token: Mutex::default() })
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

    /// Sends a request in the name of the user, if there is one.
    async fn request<Q, A>(&self, path: &'static str, request: Q) -> Result<A, CasError>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut request = tonic::Request::new(request);
        if let Some(token) = self.token().await? {
            request.metadata_mut().insert("token", token);
        }
        match self.unary(path, request).await? {
            Ok(answer) => Ok(answer),
            Err(status) if is_old_token(&status) => {
                *self.token.lock().await = None;
                Err(CasError::Retry(self.nodes.clone(), NodeError::Etcd(Box::new(status))))
            }
            Err(status) => Err(self.failed(status)),
        }
    }

    /// The user's token. etcd gives one for the name and the password.
    async fn token(&self) -> Result<Option<MetadataValue<Ascii>>, CasError> {
        let mut kept = self.token.lock().await;
        if kept.is_none()
            && let Some(user) = self.keys.user()?
        {
            let request = AuthenticateRequest { name: user.name, password: user.password };
            let answer = self.unary("/etcdserverpb.Auth/Authenticate", tonic::Request::new(request)).await?;
            let AuthenticateResponse { token } = answer.map_err(|status| self.failed(status))?;
            let unusable = |_| self.failed(tonic::Status::unauthenticated("etcd's token is not a text"));
            *kept = Some(token.parse().map_err(unusable)?);
        }
        Ok(kept.clone())
    }

    async fn unary<Q, A>(
        &self,
        path: &'static str,
        request: tonic::Request<Q>,
    ) -> Result<Result<A, tonic::Status>, CasError>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| CasError::Retry(self.nodes.clone(), error.into()))?;
        let codec = tonic_prost::ProstCodec::default();
        let answer = grpc.unary(request, PathAndQuery::from_static(path), codec).await;
        Ok(answer.map(tonic::Response::into_inner))
    }

    fn failed(&self, status: tonic::Status) -> CasError {
        if status.code() == tonic::Code::ResourceExhausted && status.message().contains("space") {
            return CasError::Report(StoreError::DiskFull(self.nodes.clone()));
        }
        let (lasts, error) = (is_lasting(status.code()), NodeError::Etcd(Box::new(status)));
        if lasts {
            return CasError::Report(StoreError::Unusable(vec![(self.nodes.clone(), error)]));
        }
        CasError::Retry(self.nodes.clone(), error)
    }
}

/// Whether etcd has forgotten the token: it was restarted, the token was not used for long, or users were changed.
fn is_old_token(status: &tonic::Status) -> bool {
    ["invalid auth token", "revision of auth store is old"].iter().any(|text| status.message().contains(text))
}

/// Whether etcd will answer in the same way until an operator corrects something.
fn is_lasting(code: tonic::Code) -> bool {
    use tonic::Code::{
        FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated, Unimplemented,
    };
    matches!(
        code,
        // The first is the answer to a user where etcd's authentication is not enabled.
        FailedPrecondition | InvalidArgument | PermissionDenied | Unauthenticated | Unimplemented
    )
}

fn tls(keys: &ClientKeys) -> Result<Option<ClientTlsConfig>, StoreError> {
    let Some(authority) = keys.read_needed("ca.crt")? else { return Ok(None) };
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority));
    Ok(Some(match keys.own()? {
        Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
        None => config,
    }))
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
