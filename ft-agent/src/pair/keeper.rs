//! The keeper of a replica (`vmft keeper`, started by the replica itself): a process beside it that has this host's private key
//! and the store's client, and that writes the files whose directories the replica may not write to. See
//! [`test_and_set::keeper`].

use std::fs::Metadata;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agent::Role;
use clap::{Args, ValueEnum};
use host_log::LogFormat;
use nix::sys::signal::{SigSet, Signal};
use test_and_set::blocking::BlockingStore;
use test_and_set::keeper::{Keeper, KeeperFailure, KeptFiles, KeptVm, PairEnd, kept_keys};
use test_and_set::keys::Keys;
use test_and_set::names::VmName;
use test_and_set::store::chain;
use test_and_set::url::StoreUrl;
use tracing::warn;

use super::options::PairPlan;
use super::quorum;
use super::sidecar::replace_file;
use crate::confine::{self, Needs, directory_of};
use crate::error::Error;

/// What the replica tells its keeper. The sockets are standard input, for keys, and standard output, for the store.
#[derive(Args, Debug)]
pub struct KeeperArgs {
    /// Directory of this host's keys
    #[arg(long)]
    keys: PathBuf,
    /// The store's URL
    #[arg(long)]
    store: StoreUrl,
    /// The VM
    #[arg(long)]
    vm: VmName,
    /// Sign handshakes of the side that connects, not of the one that listens
    #[arg(long)]
    connects: bool,
    /// The sidecars, in the order of their numbers
    #[arg(long)]
    sidecar: Vec<PathBuf>,
    /// The control socket, which is removed at the end
    #[arg(long)]
    control: Option<PathBuf>,
    /// The log's format
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    /// Do not confine the keeper
    #[arg(long)]
    no_confine: bool,
}

/// What a replica has of its keeper.
pub struct Kept {
    /// This host's keys.
    keys: Keys,
    /// Where the store is asked.
    store: UnixStream,
    /// Files and names of hosts.
    files: KeptFiles,
}

/// Starts the keeper of a replica, and waits until it is ready.
///
/// # Errors
/// The keys, the store's URL or a file cannot be used, or the process cannot be started.
pub fn start<'p>(
    role: Role,
    plan: &PairPlan,
    sidecars: impl Iterator<Item = &'p Path>,
) -> Result<Kept, Error> {
    let failed = || Error::host("cannot start the process that keeps the keys");
    let (keys, their_keys) = UnixStream::pair().map_err(failed())?;
    let (store, their_store) = UnixStream::pair().map_err(failed())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vmft").arg("keeper");
    command.arg("--keys").arg(&plan.keys).args(["--store", &plan.store, "--vm", plan.name.as_str()]);
    command.args((role == Role::Primary).then_some("--connects"));
    command.args((!plan.confine).then_some("--no-confine"));
    if let Some(format) = plan.log_format.to_possible_value() {
        command.args(["--log-format", format.get_name()]);
    }
    for sidecar in sidecars {
        command.arg("--sidecar").arg(sidecar);
    }
    if let Some(control) = &plan.control {
        command.arg("--control").arg(control);
    }
    command.stdin(Stdio::from(OwnedFd::from(their_keys))).stdout(Stdio::from(OwnedFd::from(their_store)));
    // A terminal's signals are for the replica.
    command.process_group(0).spawn().map_err(failed())?;
    let (keys, files) = kept_keys(keys).map_err(|KeeperFailure { field, why }| match &*field {
        "" => failed()(std::io::Error::other(why)),
        field => Error::config(field, why),
    })?;
    Ok(Kept { keys, store, files })
}

impl Kept {
    /// Takes it apart: the keys, the store, and what is done for this side with files and names. Starts a thread, which has
    /// the confinement of the thread that calls this.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn use_all(self) -> Result<(Keys, BlockingStore, KeptFiles), Error> {
        let store = BlockingStore::kept(self.store).map_err(|e| Error::config("store", chain(&e)))?;
        Ok((self.keys, store, self.files))
    }
}

/// `vmft keeper`: serves a replica until that has ended.
///
/// # Errors
/// The sockets are not there: somebody else has started it.
pub fn run(args: &KeeperArgs) -> Result<(), Error> {
    host_log::serve(args.log_format, vec![("vm", args.vm.to_string()), ("role", "keeper".into())]);
    ignore_signals();
    let failed = || Error::host("vmft keeper is started by vmft primary and vmft backup only");
    let socket = |fd: std::io::Result<OwnedFd>| fd.map(UnixStream::from).map_err(failed());
    let keys_socket = socket(nix::unistd::dup(std::io::stdin()).map_err(Into::into))?;
    let store_socket = socket(nix::unistd::dup(std::io::stdout()).map_err(Into::into))?;
    if !args.no_confine {
        confine::keeper(&needs(args));
    }
    host_log::write_on_thread().map_err(failed())?;
    let socket_file = args.control.as_deref().and_then(|path| path.symlink_metadata().ok());
    let url = args.store.clone();
    std::thread::spawn(move || quorum::warn_if_lost_with_this_host(&url));
    Keeper::serve(make(args, store_socket), &keys_socket);
    if let (Some(path), Some(before)) = (&args.control, socket_file) {
        remove(path, &before);
    }
    Ok(())
}

fn make(
    args: &KeeperArgs,
    store: UnixStream,
) -> Result<Keeper<impl FnMut(u32, &str) -> std::io::Result<()>>, KeeperFailure> {
    let keys = Keys::load(&args.keys).map_err(|e| KeeperFailure::of("keys", &e))?;
    let kept = KeptVm { url: args.store.clone(), vm: args.vm.clone() };
    kept.start(store).map_err(|e| KeeperFailure::of("store", &e))?;
    let sidecars = args.sidecar.clone();
    let replace = move |number: u32, text: &str| match sidecars.get(number as usize) {
        Some(path) => replace_file(path, text),
        None => Err(std::io::ErrorKind::NotFound.into()),
    };
    let end = if args.connects { PairEnd::Client } else { PairEnd::Server };
    Ok(Keeper { keys, end, replace })
}

/// The keeper lives as long as its replica: a service manager sends its signals to all processes of a service.
fn ignore_signals() {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGTSTP,
    ] {
        signals.add(signal);
    }
    // Blocked before there is another thread, they reach none.
    if let Err(e) = signals.thread_block() {
        warn!("the keeper cannot ignore signals: {e}");
    }
}

/// What the keeper opens once it is confined.
fn needs(args: &KeeperArgs) -> Needs {
    let keys = [Some(args.keys.as_path()), args.store.keys()].into_iter().flatten();
    Needs {
        // The directories below may be links to elsewhere.
        read: keys.flat_map(|keys| ["", "members", "peers"].map(|below| keys.join(below))).collect(),
        make_in: args.sidecar.iter().map(|path| directory_of(path)).collect(),
        remove_in: args.control.as_deref().map(directory_of).into_iter().collect(),
        resolves: true,
        ..Needs::default()
    }
}

/// Removes the control socket, unless another replica has made its own there.
fn remove(path: &Path, before: &Metadata) {
    let now = path.symlink_metadata();
    // The number of an inode may be used again at once.
    let identity = |file: &Metadata| (file.dev(), file.ino(), file.ctime(), file.ctime_nsec());
    if now.is_ok_and(|now| identity(&now) == identity(before))
        && let Err(e) = std::fs::remove_file(path)
    {
        warn!("cannot remove control socket {}: {e}", path.display());
    }
}
