//! The client of `etcd://`: one key for each VM, changed by transactions that compare its revision; etcd's locks are not used.
//!
//! Of etcd's protocol (version 3, gRPC) this needs one request for reading and one for transactions. The messages here have only
//! the fields that are used; protobuf skips the others.

use std::sync::atomic::{AtomicUsize, Ordering};
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

/// A node of etcd, which is connected to when it is first asked.
struct EtcdNode {
    address: String,
    channel: Channel,
}

/// A client of etcd. A node that does not serve does not keep it from the others: each request goes to one after the other, until
/// one answers.
pub struct EtcdStore {
    nodes: Vec<EtcdNode>,
    /// The node that is asked first: the one that has answered last.
    first: AtomicUsize,
    /// What was last told about nodes that do not serve although others do.
    told: Mutex<String>,
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
        let connect = |address: &String| {
            let failed =
                |error| StoreError::Unusable(vec![(address.clone(), NodeError::EtcdTransport(error))]);
            let endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(failed)?;
            let endpoint =
                endpoint.tcp_nodelay(true).connect_timeout(REQUEST_PATIENCE).timeout(REQUEST_PATIENCE);
            let endpoint = match &tls {
                Some(tls) => endpoint.tls_config(tls.clone()).map_err(failed)?,
                None => endpoint,
            };
            Ok(EtcdNode { address: address.clone(), channel: endpoint.connect_lazy() })
        };
        let nodes = nodes.iter().map(connect).collect::<Result<Vec<_>, StoreError>>()?;
        let (first, told, token) = Default::default();
        Ok(Self { nodes, first, told, prefix: prefix.into(), keys, token })
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
        Q: Message + Clone + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let token = self.token().await?;
        self.ask_each(path, request, token.as_ref()).await
    }

    /// The user's token. etcd gives one for the name and the password.
    async fn token(&self) -> Result<Option<MetadataValue<Ascii>>, CasError> {
        let mut kept = self.token.lock().await;
        if kept.is_none()
            && let Some(user) = self.keys.user()?
        {
            let request = AuthenticateRequest { name: user.name, password: user.password };
            let answer = self.ask_each("/etcdserverpb.Auth/Authenticate", request, None).await?;
            let AuthenticateResponse { token } = answer;
            let unusable = |_| {
                let status = tonic::Status::unauthenticated("etcd's token is not a text");
                let nodes = self.nodes.iter().map(|node| node.address.as_str()).collect::<Vec<_>>().join(",");
                StoreError::Unusable(vec![(nodes, NodeError::Etcd(Box::new(status)))])
            };
            *kept = Some(token.parse().map_err(unusable)?);
        }
        Ok(kept.clone())
    }

    /// Sends a request to one node after the other, until one answers.
    async fn ask_each<Q, A>(
        &self,
        path: &'static str,
        request: Q,
        token: Option<&MetadataValue<Ascii>>,
    ) -> Result<A, CasError>
    where
        Q: Message + Clone + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut failures = vec![];
        let first = self.first.load(Ordering::Relaxed);
        for at in (first..first + self.nodes.len()).map(|n| n % self.nodes.len()) {
            let mut request = tonic::Request::new(request.clone());
            if let Some(token) = token {
                request.metadata_mut().insert("token", token.clone());
            }
            let node = &self.nodes[at];
            // If the caller loses its patience here, the next request begins with the next node.
            self.first.store(at + 1, Ordering::Relaxed);
            match node.ask(path, request).await {
                Ok(answer) => {
                    self.first.store(at, Ordering::Relaxed);
                    self.tell_failures(&failures).await;
                    return Ok(answer);
                }
                Err(error) if is_full(&error) => {
                    return Err(CasError::Report(StoreError::DiskFull(node.address.clone())));
                }
                Err(error) => {
                    if is_old_token(&error) {
                        *self.token.lock().await = None;
                        return Err(CasError::Retry(vec![(node.address.clone(), error)]));
                    }
                    failures.push((node.address.clone(), error));
                }
            }
        }
        match failures.iter().all(|(_, error)| is_lasting(error)) {
            true => Err(CasError::Report(StoreError::Unusable(failures))),
            false => Err(CasError::Retry(failures)),
        }
    }

    /// Names the nodes that will not serve before an operator corrects something, once for each change.
    async fn tell_failures(&self, failures: &[(String, NodeError)]) {
        let lasting = failures.iter().filter(|(_, error)| is_lasting(error));
        let text = lasting.map(|(node, error)| format!("{node}: {error}")).collect::<Vec<_>>().join("; ");
        let mut told = self.told.lock().await;
        if !text.is_empty() && *told != text {
            tracing::warn!("the store goes on without a node that cannot serve this client: {text}");
            *told = text;
        }
    }
}

impl EtcdNode {
    async fn ask<Q, A>(&self, path: &'static str, request: tonic::Request<Q>) -> Result<A, NodeError>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await?;
        let codec = tonic_prost::ProstCodec::default();
        let answer = grpc.unary(request, PathAndQuery::from_static(path), codec).await;
        answer.map(tonic::Response::into_inner).map_err(|status| NodeError::Etcd(Box::new(status)))
    }
}

/// Whether etcd's disk is full.
fn is_full(error: &NodeError) -> bool {
    matches!(error, NodeError::Etcd(status)
        if status.code() == tonic::Code::ResourceExhausted && status.message().contains("space"))
}

/// Whether etcd has forgotten the token: it was restarted, the token was not used for long, or users were changed.
fn is_old_token(error: &NodeError) -> bool {
    let texts = ["invalid auth token", "revision of auth store is old"];
    matches!(error, NodeError::Etcd(status) if texts.iter().any(|text| status.message().contains(text)))
}

/// Whether a node will answer in the same way until an operator corrects something. What is not etcd also answers so: HTTP's 404
/// comes as `Unimplemented`, 401 as `Unauthenticated`, 403 as `PermissionDenied`.
fn is_lasting(error: &NodeError) -> bool {
    use tonic::Code::{
        FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated, Unimplemented,
    };
    matches!(
        error,
        // The first is the answer to a user where etcd's authentication is not enabled.
        NodeError::Etcd(status) if matches!(
            status.code(),
            FailedPrecondition | InvalidArgument | PermissionDenied | Unauthenticated | Unimplemented
        )
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::{HeaderMap, Response};
    use tokio::net::TcpListener;

    use super::*;
    use crate::store::TestAndSet;

    /// A server of HTTP/2 that answers each request as an etcd without records does, or with 404 as a proxy may. Returns its
    /// address.
    async fn server(is_etcd: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(socket).await.expect("HTTP/2");
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        let head = Response::builder().status(if is_etcd { 200 } else { 404 });
                        let head = head.header("content-type", "application/grpc").body(()).expect("a head");
                        let mut body = respond.send_response(head, !is_etcd).expect("a response");
                        if is_etcd {
                            // An empty message, not compressed.
                            body.send_data(Bytes::from_static(&[0; 5]), false).expect("a body");
                            let status =
                                [("grpc-status".parse().expect("a name"), "0".parse().expect("a value"))];
                            body.send_trailers(HeaderMap::from_iter(status)).expect("trailers");
                        }
                    }
                });
            }
        });
        address
    }

    async fn get(nodes: &[&String]) -> Result<Option<VmRecord>, StoreError> {
        let nodes: Vec<_> = nodes.iter().map(|node| node.to_string()).collect();
        let store = EtcdStore::new(&nodes, "/vmft", ClientKeys(None)).expect("a client");
        let vm = "web".parse().expect("a name");
        for _ in 0..5 {
            store.get(&vm, Instant::now() + Duration::from_secs(5)).await?;
        }
        store.get(&vm, Instant::now() + Duration::from_secs(5)).await
    }

    #[tokio::test]
    async fn a_node_that_answers_404_is_named_and_does_not_keep_the_client_from_the_others() {
        let (other, etcd) = (server(false).await, server(true).await);
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let silent = silent.local_addr().expect("its address").to_string();
        for nodes in [[&other, &etcd], [&etcd, &other], [&silent, &etcd]] {
            assert!(matches!(get(&nodes).await, Ok(None)), "{nodes:?}");
        }
        let Err(refused @ StoreError::Unusable(_)) = get(&[&other, &other]).await else { panic!("of use") };
        assert!(refused.to_string().contains(&other) && refused.to_string().contains("404"), "{refused}");
        // A node that is away may be back: this client is not refused for ever.
        let Err(late @ StoreError::NoAnswer { .. }) = get(&[&other, &silent]).await else {
            panic!("refused")
        };
        assert!(late.to_string().contains(&other) && late.to_string().contains(&silent), "{late}");
    }
}
