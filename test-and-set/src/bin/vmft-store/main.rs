//! `vmft-store`: runs a member of the store, and the commands of its operator.

mod backups;
mod keys_command;
mod signals;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, ErrorKind, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use backups::RestoreArgs;
use clap::{Args, Parser, Subcommand};
use host_log::LogFormat;
use keys_command::KeysCommand;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use test_and_set::keys::Keys;
use test_and_set::names::ClusterName;
use test_and_set::raft_client::RaftStore;
use test_and_set::server::raft::RaftTiming;
use test_and_set::server::{self, ServerSettings};
use test_and_set::store::{NodeError, StoreError, TestAndSet, chain};
use test_and_set::url::{StoreUrl, parse_node};
use test_and_set::wire::{NodeId, NodeStatus, StoreRequest};

/// The test-and-set store of vmft: decides which side of a pair goes on when the two lose each other.
#[derive(Parser)]
#[command(version)]
struct StoreCli {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Subcommand)]
enum StoreCommand {
    /// Run a member of the store until it is stopped or its storage fails.
    Serve(ServeArgs),
    /// Show each node's view of the cluster: its role, leader, term, log indexes, latency, disk and members. Fails if
    /// the store has no quorum.
    Status {
        #[command(flatten)]
        target: StoreArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Add a member to a running store, or remove one.
    Member {
        #[command(subcommand)]
        command: MemberCommand,
    },
    /// Write the records of all VMs to a file, from which `vmft-store restore` makes a new store. Only for operators.
    Backup {
        #[command(flatten)]
        target: StoreArgs,
        /// The file, which must not exist.
        file: PathBuf,
    },
    /// Make the data of a new cluster's first member from a backup, after the majority of the old members was lost. See
    /// docs/disasters.md.
    Restore(RestoreArgs),
    /// Make keys, or change which ones a party accepts.
    #[command(subcommand)]
    Keys(KeysCommand),
}

#[derive(Args)]
struct ServeArgs {
    /// This member's number.
    #[arg(long)]
    id: NodeId,
    /// The address on which to listen for members and clients, IP:PORT.
    #[arg(long, value_parser = parse_listen)]
    listen: SocketAddr,
    /// The first members, including this one, as 1=HOST:PORT,2=HOST:PORT,3=HOST:PORT. Give the same list to each of them.
    #[arg(long, value_delimiter = ',', value_parser = parse_peer)]
    peers: Vec<(NodeId, String)>,
    /// The directory of this member's data, made if it does not exist.
    #[arg(long)]
    data: PathBuf,
    /// The directory of this member's keys: own.key, own.crt, members/, hosts/, operators/.
    #[arg(long)]
    keys: PathBuf,
    /// The name of the cluster; all members and clients must give the same.
    #[arg(long, default_value = "vmft")]
    cluster: ClusterName,
    /// Wait to be added to a running cluster with `vmft-store member add`, instead of forming one with --peers.
    #[arg(long, conflicts_with = "peers")]
    join: bool,
    /// The address on which to serve /metrics for Prometheus, over plain HTTP, IP:PORT.
    #[arg(long, value_parser = parse_listen)]
    metrics: Option<SocketAddr>,
    /// The interval of the leader's heartbeats in milliseconds; the leader is suspected after 7.5 to 10 intervals of silence.
    #[arg(long, default_value_t = RaftTiming::default().heartbeat_ms, value_parser = clap::value_parser!(u64).range(10..=10_000))]
    heartbeat_ms: u64,
    /// The number of commands between two snapshots.
    #[arg(long, default_value_t = RaftTiming::default().snapshot_every, value_parser = clap::value_parser!(u64).range(10..))]
    snapshot_every: u64,
    /// How many VM names one host may open. Names are never given back; a VM that is started again keeps its own.
    #[arg(long, default_value_t = ServerSettings::NAMES_PER_HOST, value_parser = clap::value_parser!(u64).range(1..))]
    names_per_host: u64,
    /// What each line of the log on standard error is.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Args)]
struct StoreArgs {
    /// The store's URL: raft://HOST:PORT,HOST:PORT?keys=DIR[&cluster=NAME]
    #[arg(long)]
    store: String,
    /// How many seconds to wait for an answer.
    #[arg(long, default_value_t = 5)]
    patience: u64,
}

#[derive(Subcommand)]
enum MemberCommand {
    /// Add a member, which must run with --join. First copy its certificate into members/ of all other members, and theirs into its
    /// members/.
    Add {
        #[command(flatten)]
        target: StoreArgs,
        /// The member's number, as it was started with --id.
        id: NodeId,
        /// The address at which the others reach it, HOST:PORT.
        #[arg(value_parser = |text: &str| parse_node(text))]
        address: String,
    },
    /// Remove a member. Stop it afterwards.
    Remove {
        #[command(flatten)]
        target: StoreArgs,
        /// The member's number.
        id: NodeId,
    },
}

fn parse_listen(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "give an IP address of this host and a port, for example 192.0.2.1:7400")
}

fn parse_peer(text: &str) -> Result<(NodeId, String), String> {
    let (id, address) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NUMBER=HOST:PORT"))?;
    let id = id.parse().map_err(|_| format!("{id:?} is not a number"))?;
    Ok((id, parse_node(address).map_err(|e| e.to_string())?))
}

fn main() -> ExitCode {
    // A crash must not leave this process's keys in a file; where that cannot be had, it is as safe as other programs.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).ok();
    let cli = match StoreCli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => return usage(&answer),
    };
    host_log::init();
    let result = run(cli.command);
    if let Err(error) = &result {
        tracing::error!("vmft-store: {}", chain(&**error));
    }
    host_log::flush();
    if result.is_ok() && !host_log::is_text_lost() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(command: StoreCommand) -> Result<(), Box<dyn Error>> {
    // One thread: a verdict is a chain of small steps, and each step on another thread would cost a wake-up.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            StoreCommand::Serve(serve) => {
                let format = serve.log_format;
                let settings = settings(serve)?;
                let member = ("member", settings.id.to_string());
                host_log::serve(format, vec![("cluster", settings.cluster.to_string()), member]);
                host_log::write_on_thread()?;
                tokio::select! {
                    ended = server::serve(settings) => Ok(ended?),
                    interrupted = signals::interrupted() => Ok(interrupted?),
                }
            }
            StoreCommand::Status { target, json } => status(&target, json).await,
            StoreCommand::Backup { target, file } => {
                let (_, store, cluster) = store(&target)?;
                backups::save(&store, cluster, &file, deadline(&target)).await
            }
            StoreCommand::Restore(restore) => backups::make_member(restore),
            StoreCommand::Member { command: MemberCommand::Add { target, id, address } } => {
                Ok(store(&target)?
                    .1
                    .change_members(StoreRequest::AddMember(id, address), deadline(&target))
                    .await?)
            }
            StoreCommand::Member { command: MemberCommand::Remove { target, id } } => Ok(store(&target)?
                .1
                .change_members(StoreRequest::RemoveMember(id), deadline(&target))
                .await?),
            StoreCommand::Keys(command) => Ok(command.run()?),
        }
    })
}

/// Prints what clap has to say: an error in the options, or the help that was asked for.
fn usage(answer: &clap::Error) -> ExitCode {
    let wrong = answer.use_stderr();
    match answer.print() {
        _ if wrong => ExitCode::from(2),
        Err(e) if e.kind() != ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

/// Prints lines on standard output.
fn print(lines: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    printed(writeln!(out, "{lines}").and_then(|()| out.flush()))
}

/// The result of printing: it is no error that the reader has seen enough, as `head` has.
fn printed(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

fn settings(serve: ServeArgs) -> Result<ServerSettings, Box<dyn Error>> {
    let peers: BTreeMap<_, _> = serve.peers.iter().cloned().collect();
    if peers.len() != serve.peers.len() {
        return Err("--peers gives the same number to two members".into());
    }
    if !serve.join && !peers.contains_key(&serve.id) {
        return Err(format!(
            "--peers must include this member, {}; to be added to a running cluster, use --join instead",
            serve.id
        )
        .into());
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
        names_per_host: serve.names_per_host,
    })
}

/// How long `status` waits for an answer of the quorum: an election takes less.
const QUORUM_PATIENCE: Duration = Duration::from_secs(2);

fn deadline(target: &StoreArgs) -> Instant {
    Instant::now() + Duration::from_secs(target.patience)
}

fn store(target: &StoreArgs) -> Result<(Vec<String>, RaftStore, ClusterName), Box<dyn Error>> {
    match target.store.parse().map_err(StoreError::Url)? {
        StoreUrl::Raft { nodes, keys, cluster } => {
            let keys = Keys::load(&keys).map_err(StoreError::Keys)?;
            Ok((nodes.clone(), RaftStore::new(nodes, keys, cluster.clone())?, cluster))
        }
        _ => {
            Err("--store must be a raft:// URL: use etcd's and ZooKeeper's own tools for their members"
                .into())
        }
    }
}

async fn status(target: &StoreArgs, json: bool) -> Result<(), Box<dyn Error>> {
    let (nodes, store, _) = store(target)?;
    let mut found = vec![];
    for node in nodes {
        let asked = Instant::now();
        let status = store.status(&node, deadline(target)).await;
        found.push((node, status, asked.elapsed()));
    }
    let quorum = ask_quorum(&store, target).await;
    let mut out = io::stdout().lock();
    let reached = found.iter().any(|(_, status, _)| status.is_ok());
    let shown = if json {
        let rows = found.iter().map(|(node, status, took)| {
            let answer = match status {
                Ok(status) => serde_json::json!({ "status": status }),
                Err(error) => serde_json::json!({ "error": error.to_string() }),
            };
            serde_json::json!({ "node": node, "answered_us": took.as_micros() as u64, "answer": answer })
        });
        let text = serde_json::to_string_pretty(&rows.collect::<Vec<_>>())?;
        writeln!(out, "{text}")
    } else {
        found.iter().try_for_each(|(node, status, took)| show(&mut out, node, status, *took))
    };
    printed(shown.and_then(|()| out.flush()))?;
    match quorum {
        Ok(()) => Ok(()),
        Err(_) if !reached => {
            Err("no node of the store answered; the output above has the reason for each".into())
        }
        Err(e) => Err(format!(
            "the store has no quorum: nothing that needs one was answered ({}); it gives no verdict until a majority of \
             its members is back",
            chain(&e)
        )
        .into()),
    }
}

/// Asks something that only a leader with a majority can answer. There need not be a VM of this name.
async fn ask_quorum(store: &RaftStore, target: &StoreArgs) -> Result<(), StoreError> {
    let any_vm = "vmft".parse().unwrap_or_else(|e| unreachable!("a name: {e}"));
    let deadline = deadline(target).min(Instant::now() + QUORUM_PATIENCE);
    store.get(&any_vm, deadline).await.map(drop)
}

fn show(
    out: &mut impl Write,
    node: &str,
    status: &Result<NodeStatus, NodeError>,
    took: Duration,
) -> io::Result<()> {
    let status = match status {
        Ok(status) => status,
        Err(error) => return writeln!(out, "{node}  {error}"),
    };
    let index = |index: Option<u64>| index.map_or("-".into(), |i| i.to_string());
    writeln!(
        out,
        "{node}  member {} of {}: {}, answered in {took:.1?}",
        status.id, status.cluster, status.role
    )?;
    writeln!(out, "  term {}, leader {}", status.term, index(status.leader))?;
    writeln!(
        out,
        "  log {}, applied {}, snapshot {}, purged {}",
        index(status.last_log_index),
        index(status.applied_index),
        index(status.snapshot_index),
        index(status.purged_index)
    )?;
    let (half, most) = status.command_us;
    writeln!(out, "  {} VMs; {} commands here, p50 {half} us, p99 {most} us", status.vms, status.commands)?;
    let full = if status.disk_full { ", FULL: free some space" } else { "" };
    writeln!(
        out,
        "  data of format {}: change {}, {} KiB, disk free {} MiB{full}",
        status.data_format,
        status.change,
        status.data_bytes >> 10,
        status.disk_free_bytes >> 20
    )?;
    for (id, member) in &status.members {
        let votes = if member.votes { "votes" } else { "does not vote" };
        let matched = member.matched_index.map(|i| format!(", holds {i}")).unwrap_or_default();
        writeln!(out, "  member {id}  {}  {votes}{matched}", member.address)?;
    }
    Ok(())
}
