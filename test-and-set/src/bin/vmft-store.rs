//! `vmft-store`: a member of the store, and the commands for its operator.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use test_and_set::keys::{self, Keys};
use test_and_set::names::ClusterName;
use test_and_set::raft_client::RaftStore;
use test_and_set::server::raft::RaftTiming;
use test_and_set::server::{self, ServerSettings};
use test_and_set::store::{NodeError, StoreError, chain};
use test_and_set::url::{StoreUrl, parse_node};
use test_and_set::wire::{NodeId, NodeStatus, StoreRequest};

/// The test-and-set store of vmft: one verdict, whatever fails.
#[derive(Parser)]
#[command(version)]
struct StoreCli {
    #[command(subcommand)]
    verb: StoreCommand,
}

#[derive(Subcommand)]
enum StoreCommand {
    /// Run a member of the store.
    Serve(ServeArgs),
    /// Show each node's members, leader, term, indexes and latency.
    Status {
        #[command(flatten)]
        at: StoreArgs,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Change the members of a running store.
    Member {
        #[command(subcommand)]
        change: MemberCommand,
    },
    /// Make the keys and pinned certificates for a trial.
    Keys {
        /// A new directory; it gets one directory for each member and client.
        dir: PathBuf,
        /// The numbers of the members.
        #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
        members: Vec<NodeId>,
        /// The names of the clients.
        #[arg(long, value_delimiter = ',', default_value = "client")]
        clients: Vec<String>,
    },
}

#[derive(Args)]
struct ServeArgs {
    /// This member's number.
    #[arg(long)]
    id: NodeId,
    /// Where to listen for members and clients.
    #[arg(long)]
    listen: SocketAddr,
    /// The first members, this one among them: 1=HOST:PORT,2=HOST:PORT,3=HOST:PORT. The same list on each of them.
    #[arg(long, value_delimiter = ',', value_parser = parse_peer)]
    peers: Vec<(NodeId, String)>,
    /// This member's data.
    #[arg(long)]
    data: PathBuf,
    /// This member's keys: own.key, own.crt, members/, clients/.
    #[arg(long)]
    keys: PathBuf,
    /// The cluster's name.
    #[arg(long, default_value = "vmft")]
    cluster: ClusterName,
    /// Wait to be added by `member add` instead of forming a cluster with --peers.
    #[arg(long, conflicts_with = "peers")]
    join: bool,
    /// Where Prometheus scrapes /metrics, over plain HTTP.
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// How often the leader is heard at least; it is suspected after 7.5 to 10 times this.
    #[arg(long, default_value_t = RaftTiming::default().heartbeat_ms, value_parser = clap::value_parser!(u64).range(10..=10_000))]
    heartbeat_ms: u64,
    /// Commands between two snapshots.
    #[arg(long, default_value_t = RaftTiming::default().snapshot_every, value_parser = clap::value_parser!(u64).range(10..))]
    snapshot_every: u64,
}

#[derive(Args)]
struct StoreArgs {
    /// The store: raft://HOST:PORT,HOST:PORT?keys=DIR
    #[arg(long)]
    store: String,
    /// Seconds to wait.
    #[arg(long, default_value_t = 5)]
    patience: u64,
}

#[derive(Subcommand)]
enum MemberCommand {
    /// Add a member that was started with --join. Its certificate must be in members/ of all others, and theirs in its own.
    Add {
        #[command(flatten)]
        at: StoreArgs,
        /// Its number.
        id: NodeId,
        /// Where the others reach it, HOST:PORT.
        #[arg(value_parser = |text: &str| parse_node(text))]
        address: String,
    },
    /// Remove a member.
    Remove {
        #[command(flatten)]
        at: StoreArgs,
        /// Its number.
        id: NodeId,
    },
}

fn parse_peer(text: &str) -> Result<(NodeId, String), String> {
    let (id, address) = text.split_once('=').ok_or_else(|| format!("{text:?} is not ID=HOST:PORT"))?;
    let id = id.parse().map_err(|_| format!("{id:?} is not a member's number"))?;
    Ok((id, parse_node(address).map_err(|e| e.to_string())?))
}

fn main() -> ExitCode {
    match run(StoreCli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmft-store: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: StoreCommand) -> Result<(), Box<dyn Error>> {
    // One thread: a verdict is a chain of small steps, and each one that another thread takes costs a wake-up.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match verb {
            StoreCommand::Serve(serve) => {
                let settings = settings(serve)?;
                tokio::select! {
                    ended = server::serve(settings) => Ok(ended?),
                    interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
                }
            }
            StoreCommand::Status { at, json } => status(&at, json).await,
            StoreCommand::Member { change: MemberCommand::Add { at, id, address } } => {
                Ok(store(&at)?.1.change_members(StoreRequest::AddMember(id, address), deadline(&at)).await?)
            }
            StoreCommand::Member { change: MemberCommand::Remove { at, id } } => {
                Ok(store(&at)?.1.change_members(StoreRequest::RemoveMember(id), deadline(&at)).await?)
            }
            StoreCommand::Keys { dir, members, clients } => Ok(keys::make_set(&dir, &members, &clients)?),
        }
    })
}

fn settings(serve: ServeArgs) -> Result<ServerSettings, Box<dyn Error>> {
    let peers: BTreeMap<_, _> = serve.peers.iter().cloned().collect();
    if peers.len() != serve.peers.len() {
        return Err("--peers names a number twice".into());
    }
    if !serve.join && !peers.contains_key(&serve.id) {
        return Err(format!("--peers must name this member, {}, too; or use --join", serve.id).into());
    }
    Ok(ServerSettings {
        id: serve.id,
        listen: serve.listen,
        peers,
        data: serve.data,
        keys: serve.keys,
        cluster: serve.cluster,
        join: serve.join,
        metrics: serve.metrics,
        timing: RaftTiming { heartbeat_ms: serve.heartbeat_ms, snapshot_every: serve.snapshot_every },
    })
}

fn deadline(at: &StoreArgs) -> Instant {
    Instant::now() + Duration::from_secs(at.patience)
}

fn store(at: &StoreArgs) -> Result<(Vec<String>, RaftStore), Box<dyn Error>> {
    match at.store.parse().map_err(StoreError::Url)? {
        StoreUrl::Raft { nodes, keys, cluster } => {
            Ok((nodes.clone(), RaftStore::new(nodes, Keys::load(&keys).map_err(StoreError::Keys)?, cluster)?))
        }
        _ => Err("this is for raft:// only; etcd and ZooKeeper have tools of their own".into()),
    }
}

async fn status(at: &StoreArgs, json: bool) -> Result<(), Box<dyn Error>> {
    let (nodes, store) = store(at)?;
    let mut found = vec![];
    for node in nodes {
        let asked = Instant::now();
        let status = store.status(&node, deadline(at)).await;
        found.push((node, status, asked.elapsed()));
    }
    let reached = found.iter().any(|(_, status, _)| status.is_ok());
    if json {
        let rows = found.iter().map(|(node, status, took)| {
            let answer = match status {
                Ok(status) => serde_json::json!({ "status": status }),
                Err(error) => serde_json::json!({ "error": error.to_string() }),
            };
            serde_json::json!({ "node": node, "answered_us": took.as_micros() as u64, "answer": answer })
        });
        println!("{}", serde_json::to_string_pretty(&rows.collect::<Vec<_>>())?);
    } else {
        found.iter().for_each(|(node, status, took)| show(node, status, *took));
    }
    if reached { Ok(()) } else { Err("no node answered".into()) }
}

fn show(node: &str, status: &Result<NodeStatus, NodeError>, took: Duration) {
    let status = match status {
        Ok(status) => status,
        Err(error) => return println!("{node}  {error}"),
    };
    let index = |index: Option<u64>| index.map_or("-".into(), |i| i.to_string());
    println!("{node}  member {} of {}: {}, answered in {took:.1?}", status.id, status.cluster, status.role);
    println!("  term {}, leader {}", status.term, index(status.leader));
    println!(
        "  log {}, applied {}, snapshot {}, purged {}",
        index(status.last_log_index),
        index(status.applied_index),
        index(status.snapshot_index),
        index(status.purged_index)
    );
    let (half, most) = status.command_us;
    println!("  {} VMs; {} commands here, p50 {half} us, p99 {most} us", status.vms, status.commands);
    let full = if status.disk_full { ", FULL: free some" } else { "" };
    println!("  data {} KiB, disk free {} MiB{full}", status.data_bytes >> 10, status.disk_free_bytes >> 20);
    for (id, member) in &status.members {
        let votes = if member.votes { "votes" } else { "does not vote" };
        let matched = member.matched_index.map(|i| format!(", holds {i}")).unwrap_or_default();
        println!("  member {id}  {}  {votes}{matched}", member.address);
    }
}
