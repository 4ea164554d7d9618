//! A running member, and its answers to clients.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tokio::sync::Mutex;
use tracing::error;

use crate::keys::Keys;
use crate::names::{ClusterName, VmName};
use crate::record::{Asker, Command, HostId, VmRecord};
use crate::server::audit::AuditNote;
use crate::server::disk::MemberDisk;
use crate::server::disk_error::DATA_FORMAT;
use crate::server::peers::OtherMembers;
use crate::server::raft::{Raft, VmCommand};
use crate::server::stats::{LatencyHistogram, NodeStats};
use crate::store::PAGE_RECORDS_MAX;
use crate::wire::{
    NodeId, NodeStatus, PAGE_BYTES, PeerAnswer, PeerAsk, PeerResponse, RequestFailure, StoreRequest,
    StoreResponse,
};

/// A running member.
pub struct Node {
    pub(super) id: NodeId,
    pub(super) cluster: ClusterName,
    pub(super) disk: Arc<MemberDisk>,
    pub(super) peers: Arc<OtherMembers>,
    pub(super) raft: Raft,
    pub(super) stats: NodeStats,
    pub(super) keys: Arc<Keys>,
    /// How many VM names one host may open.
    pub(super) names_per_host: u64,
}

impl Node {
    /// Answers a client's request; `asker` says who that is.
    pub(super) async fn answer(&self, request: StoreRequest, asker: &Asker) -> StoreResponse {
        let answer = match request {
            StoreRequest::Command(vm, command) => {
                let request = VmCommand {
                    vm,
                    command: self.name_hosts(command),
                    asker: Some(asker.clone()),
                    names_max: self.names_per_host,
                };
                timed(&self.stats.commands, self.raft.command(request)).await.map(StoreResponse::Reply)
            }
            StoreRequest::Get(vm) => {
                let look = self.raft.read(|state| state.get(&vm).cloned());
                timed(&self.stats.reads, look).await.map(StoreResponse::Record)
            }
            StoreRequest::List(after) => {
                let look = self.raft.read(|state| page(state.list(after.as_ref())));
                timed(&self.stats.reads, look).await.map(StoreResponse::Page)
            }
            StoreRequest::Export(after) => {
                let look = self.raft.read(|state| page(state.all(after.as_ref())));
                let look = async {
                    self.check_operator(asker, "copy all records").await?;
                    look.await
                };
                Box::pin(timed(&self.stats.reads, look)).await.map(StoreResponse::Page)
            }
            StoreRequest::Ping => Ok(StoreResponse::Leader(self.raft.leader().map(|(_, address)| address))),
            StoreRequest::Status => Ok(StoreResponse::Status(Box::new(self.status()))),
            StoreRequest::AddMember(id, address) => {
                let what = format!("add member {id} at {address}");
                let change = self.raft.add_member(id, address);
                Box::pin(self.audited(asker, what, change)).await.map(|()| StoreResponse::MembersChanged)
            }
            StoreRequest::RemoveMember(id) => {
                let what = format!("remove member {id}");
                let change = self.raft.remove_member(id);
                Box::pin(self.audited(asker, what, change)).await.map(|()| StoreResponse::MembersChanged)
            }
            StoreRequest::HostOf(key) => Ok(StoreResponse::Host(self.keys.host_with_key(&key))),
        };
        answer.unwrap_or_else(|failure| {
            if !matches!(failure, RequestFailure::NotLeader(_)) {
                self.stats.failures.fetch_add(1, Relaxed);
            }
            StoreResponse::Failed(failure)
        })
    }

    /// Answers another member's request. `snapshot` collects the parts of the snapshot that arrives on its connection.
    pub(super) async fn answer_member(
        &self,
        from: NodeId,
        ask: PeerAsk,
        snapshot: &Mutex<Vec<u8>>,
    ) -> PeerAnswer {
        self.peers.asked().await;
        let response = match self.peers.hear(from, &ask, |id| self.raft.is_member(id)) {
            Ok(()) => self.raft.answer(ask.request, snapshot).await,
            Err(_) => PeerResponse::Failed(RequestFailure::Stopped),
        };
        PeerAnswer { mark: self.disk.mark(), response }
    }

    /// Replaces the keys by which a client names hosts by the hosts' names, so that a host keeps its rights when its key is
    /// replaced. The rule refuses keys that are left.
    fn name_hosts(&self, mut command: Command) -> Command {
        if let Command::Open { members, .. } = &mut command {
            for host in members.iter_mut().filter_map(|member| member.host.as_mut()) {
                if let HostId::Key(key) = host
                    && let Some(name) = self.keys.host_with_key(key)
                {
                    *host = HostId::Name(name);
                }
            }
        }
        command
    }

    /// Refuses one that is no operator, and notes that in every member's audit.
    async fn check_operator(&self, asker: &Asker, what: &str) -> Result<(), RequestFailure> {
        if asker.operator.is_some() {
            return Ok(());
        }
        let why = format!(
            "only operators may {what}, and this certificate is no operator's: use an operator's keys"
        );
        let (asker, verdict) = (asker.clone(), format!("refused: {why}"));
        self.raft.note(AuditNote { asker, what: what.into(), verdict }).await?;
        Err(RequestFailure::NotAllowed(why))
    }

    /// Does what only operators may ask for. Every member's audit says who asked and, afterwards, what became of it.
    async fn audited<T>(
        &self,
        asker: &Asker,
        what: String,
        act: impl Future<Output = Result<T, RequestFailure>>,
    ) -> Result<T, RequestFailure> {
        self.check_operator(asker, &what).await?;
        let note = |verdict: String| AuditNote { asker: asker.clone(), what: what.clone(), verdict };
        // Without a leader that reaches a majority nothing can be noted, and nothing is done.
        self.raft.note(note("begun".into())).await?;
        let done = act.await;
        let verdict = done.as_ref().map_or_else(|failure| format!("failed: {failure}"), |_| "done".into());
        if let Err(failure) = self.raft.note(note(verdict)).await {
            error!("cannot note in the audit that this has ended: {what}: {failure}");
        }
        done
    }

    fn status(&self) -> NodeStatus {
        let view = self.raft.view();
        let (disk_free_bytes, data_bytes) = self.disk.space();
        let commands = &self.stats.commands;
        NodeStatus {
            id: self.id,
            cluster: self.cluster.clone(),
            role: view.role.into(),
            term: view.term,
            leader: view.leader,
            members: view.members,
            last_log_index: view.last_log_index,
            applied_index: view.applied_index,
            snapshot_index: view.snapshot_index,
            purged_index: view.purged_index,
            vms: view.vms,
            commands: commands.count(),
            command_us: (commands.quantile_us(0.5), commands.quantile_us(0.99)),
            data_format: DATA_FORMAT,
            change: self.disk.mark().change,
            disk_free_bytes,
            data_bytes,
            disk_full: self.disk.is_full(),
        }
    }
}

/// Adds the time that an answer took to `latency`; failures are not added.
async fn timed<T>(
    latency: &LatencyHistogram,
    answer: impl Future<Output = Result<T, RequestFailure>>,
) -> Result<T, RequestFailure> {
    let begun = Instant::now();
    let answer = answer.await;
    if answer.is_ok() {
        latency.add(begun.elapsed());
    }
    answer
}

/// As many of the records as fit into one response.
fn page<'s>(records: impl Iterator<Item = (&'s VmName, &'s VmRecord)>) -> Vec<(VmName, VmRecord)> {
    let mut bytes = 0;
    let fits = |(vm, record): &(&VmName, &VmRecord)| {
        let before = bytes;
        bytes += postcard::experimental::serialized_size(&(vm, record)).unwrap_or(PAGE_BYTES);
        before < PAGE_BYTES
    };
    records.take(PAGE_RECORDS_MAX).take_while(fits).map(|(vm, record)| (vm.clone(), record.clone())).collect()
}
