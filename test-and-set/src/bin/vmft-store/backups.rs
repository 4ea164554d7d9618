//! `vmft-store backup` and `vmft-store restore`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use test_and_set::backup::StoreBackup;
use test_and_set::names::ClusterName;
use test_and_set::raft_client::RaftStore;
use test_and_set::server::restore::{check_empty, restore};
use test_and_set::wire::NodeId;

use crate::print;

#[derive(Args)]
pub struct RestoreArgs {
    /// The backup.
    file: PathBuf,
    /// The new member's number.
    #[arg(long)]
    id: NodeId,
    /// The new member's number and address, as N=HOST:PORT. It is the only member; add others with `vmft-store member add`.
    #[arg(long, value_delimiter = ',', value_parser = crate::parse_peer)]
    peers: Vec<(NodeId, String)>,
    /// The directory of the new member's data, which must be empty or not exist.
    #[arg(long)]
    data: PathBuf,
    /// The name of the cluster; by default that of the backup.
    #[arg(long)]
    cluster: Option<ClusterName>,
    /// Do it. No member of the old cluster may ever run again: two stores would give two verdicts.
    #[arg(long)]
    force_new_cluster: bool,
}

/// Writes a backup of a store.
pub async fn save(
    store: &RaftStore,
    cluster: ClusterName,
    file: &Path,
    deadline: Instant,
) -> Result<(), Box<dyn Error>> {
    let backup = StoreBackup::read(store, cluster, deadline).await?;
    backup.write(file)?;
    let lines =
        format!("{} VMs of cluster {} are in {}", backup.records.len(), backup.cluster, file.display());
    Ok(print(&lines)?)
}

/// Makes a member's data from a backup, or says what it would do.
pub fn make_member(args: RestoreArgs) -> Result<(), Box<dyn Error>> {
    let [(peer, address)] = &args.peers[..] else {
        return Err(
            "--peers must have the new member only, as N=HOST:PORT; add others with `vmft-store member add`"
                .into(),
        );
    };
    if *peer != args.id {
        return Err(format!("--peers has member {peer}, but --id is {}", args.id).into());
    }
    let backup = StoreBackup::load(&args.file)?;
    check_empty(&args.data)?;
    let cluster = args.cluster.unwrap_or_else(|| backup.cluster.clone());
    let (dir, vms, begun) = (args.data.display(), backup.records.len(), backup.begun_s);
    let what = format!(
        "member {peer} at {address}, the only one of cluster {cluster}, with the {vms} VMs of a backup that was begun {begun} s after \
         1970-01-01 UTC"
    );
    if !args.force_new_cluster {
        return Err(format!(
            "nothing was done. This would make in {dir} the data of {what}. Verdicts that were given later are lost: see \
             docs/disasters.md. When no member of the old cluster can ever run again, say it again with --force-new-cluster"
        )
        .into());
    }
    restore(backup, &args.data, &cluster, (args.id, address))?;
    Ok(print(&format!(
        "{dir} has the data of {what}\nstart it with `vmft-store serve --id {peer} --peers {peer}={address} --cluster {cluster} \
         --data {dir} ...`, then add members"
    ))?)
}
