//! What `vmft primary` and `vmft backup` take, in flags or in a TOML file. A flag wins over the file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use agent::{Buffers, LagLimitAction, PairTiming, Role};
use clap::{Args, ValueEnum};
use entry::PositionUnit;
use host_log::LogFormat;
use serde::Deserialize;
use test_and_set::names::VmName;
use test_and_set::url::StoreUrl;

use crate::error::Error;
use crate::options::{ClockMode, GuestPlan, RunOptions};

/// Options of both sides of a pair. In a file, the machine's options are in the table `[machine]`.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PairOptions {
    /// Name of the VM, the same on both sides
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// URL of the store: raft://HOST:PORT,...?keys=DIR, etcd://... or zookeeper://...
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Directory of this host's keys, with own.key, own.crt and peers/
    #[arg(long, value_name = "DIR")]
    pub keys: Option<PathBuf>,
    /// Primary: address on which its backup listens
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Option<String>,
    /// Backup: address on which it listens for its primary
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse_listen)]
    pub listen: Option<SocketAddr>,
    /// Primary: start without a backup
    #[arg(long)]
    pub unprotected: bool,
    /// Start from these disk images even if the store knows of newer copies; data that only those have is lost
    #[arg(long)]
    pub discard_newer: bool,
    /// Create this Unix socket, for vmft status, failover, stop and console
    #[arg(long, value_name = "FILE")]
    pub control: Option<PathBuf>,
    /// Run this shell command whenever the VM becomes protected, at risk or unprotected. Its environment has VMFT_STATE
    /// (PROTECTED, AT_RISK or UNPROTECTED), VMFT_VM, VMFT_ROLE, VMFT_PHASE and VMFT_GENERATION
    #[arg(long, value_name = "COMMAND")]
    pub hook: Option<String>,
    /// Time after which the command of --hook is killed, with all that it has started [default: 30]
    #[arg(long, value_name = "S")]
    pub hook_seconds: Option<u64>,
    /// Serve /metrics for Prometheus on this address, over plain HTTP
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse_listen)]
    pub metrics: Option<SocketAddr>,
    /// What each line of the log on standard error is [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// For debugging: do not confine the process with seccomp and Landlock
    #[arg(long)]
    pub no_confine: bool,
    /// Time without a message after which the peer counts as lost; the same on both sides [default: 1000]
    #[arg(long, value_name = "MS")]
    pub timeout_ms: Option<u64>,
    /// Time between two heartbeats, at most a quarter of --timeout-ms [default: 50]
    #[arg(long, value_name = "MS")]
    pub heartbeat_ms: Option<u64>,
    /// Time after which a peer that has work but makes no progress counts as lost [default: 5000]
    #[arg(long, value_name = "MS")]
    pub progress_timeout_ms: Option<u64>,
    /// How much log may be in transit or wait for replay [default: 32]
    #[arg(long, value_name = "MIB")]
    pub buffer_mib: Option<u64>,
    /// Lag of the backup at which the guest is slowed to a twentieth of its speed, and the VM is AT RISK [default: 2000]
    #[arg(long, value_name = "MS")]
    pub lag_max_ms: Option<u64>,
    /// Lag of the backup that --at-lag-limit is for, at least --lag-max-ms [default: three times --lag-max-ms]
    #[arg(long, value_name = "MS")]
    pub lag_limit_ms: Option<u64>,
    /// At that lag, stop the guest until the backup has caught up, or give the backup up and go on alone [default: stop]
    #[arg(long, value_name = "WHAT")]
    pub at_lag_limit: Option<AtLagLimit>,
    /// The machine
    #[command(flatten)]
    pub machine: RunOptions,
}

/// What `--at-lag-limit` takes.
#[derive(ValueEnum, Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtLagLimit {
    /// The guest stops until the backup has caught up.
    Stop,
    /// The backup counts as lost.
    GiveUp,
}

/// Checked options of both sides.
pub struct PairPlan {
    /// Name of the VM.
    pub name: VmName,
    /// The store's URL.
    pub store: String,
    /// Directory of this host's keys.
    pub keys: PathBuf,
    /// Where the backup listens; `None` for an unprotected primary.
    pub peer: Option<String>,
    /// Where a backup listens.
    pub listen: Option<SocketAddr>,
    /// Start even from disk images that are not the newest copies.
    pub discard_newer: bool,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// The user's command for each change between PROTECTED, AT RISK and UNPROTECTED.
    pub hook: Option<String>,
    /// How many seconds the command may take.
    pub hook_seconds: u64,
    /// Where Prometheus scrapes the metrics.
    pub metrics: Option<SocketAddr>,
    /// What the log's lines are.
    pub log_format: LogFormat,
    /// Confine the process by seccomp and Landlock.
    pub confine: bool,
    /// The timeouts of the pair, and the interval of heartbeats.
    pub timing: PairTiming,
    /// Limits of the log that is in transit or waits for replay.
    pub buffers: Buffers,
    /// The machine.
    pub machine: GuestPlan,
}

impl PairPlan {
    /// The unit of positions, which depends on the engine.
    pub fn engine_unit(&self) -> PositionUnit {
        self.machine.engine.unit()
    }

    /// Where guest time comes from.
    pub fn clock(&self) -> ClockMode {
        self.machine.clock.unwrap_or_default()
    }
}

impl PairOptions {
    /// Adds the options of the file that `--config` names.
    ///
    /// # Errors
    /// [`Error::Config`] if the file cannot be read, or a flag does nothing in this role.
    pub fn with_file(mut self, role: Role) -> Result<PairOptions, Error> {
        self.check_flags(role)?;
        match self.machine.config.take() {
            Some(path) => Ok(self.over(read_file(&path)?)),
            None => Ok(self),
        }
    }

    /// From now on this process's messages are lines of a log, which name the VM and its side.
    pub fn start_log(&self, role: &str) {
        let vm = self.name.clone().unwrap_or_default();
        host_log::serve(self.log_format.unwrap_or_default(), vec![("vm", vm), ("role", role.to_owned())]);
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Config`] if an option is missing or wrong.
    pub fn check(self, role: Role) -> Result<PairPlan, Error> {
        let o = self;
        let vm = o.name.as_ref().map(|name| format!("{} {name}", scope(o.store.as_deref())));
        let needed = |field| {
            Error::config(field, format!("--{field} is missing; give it, or set it in the file of --config"))
        };
        let name = o.name.ok_or_else(|| needed("name"))?;
        if role == Role::Primary && o.peer.is_some() == o.unprotected {
            return Err(Error::config("peer", "a primary needs either --peer HOST:PORT or --unprotected"));
        }
        o.peer.as_deref().map(check_peer).transpose()?;
        if role == Role::Backup && o.listen.is_none() {
            return Err(needed("listen"));
        }
        let timing = timing(o.timeout_ms, o.heartbeat_ms, o.progress_timeout_ms)?;
        let lag_ns_max = ms("lag-max-ms", o.lag_max_ms, Buffers::default().lag_ns_max, 10, 600_000)?;
        let buffers = Buffers {
            buffer_bytes: within("buffer-mib", o.buffer_mib, Buffers::default().buffer_bytes >> 20, 1, 4096)?
                << 20,
            lag_ns_max,
            lag_ns_limit: ms(
                "lag-limit-ms",
                o.lag_limit_ms,
                3 * lag_ns_max,
                lag_ns_max / 1_000_000,
                3_600_000,
            )?,
            at_lag_limit: match o.at_lag_limit.unwrap_or(AtLagLimit::Stop) {
                AtLagLimit::Stop => LagLimitAction::StopGuest,
                AtLagLimit::GiveUp => LagLimitAction::GiveUpBackup,
            },
            ..Buffers::default()
        };
        Ok(PairPlan {
            name: name.parse().map_err(|e| Error::config("name", format!("{name:?}: {e}")))?,
            store: o.store.ok_or_else(|| needed("store"))?,
            keys: o.keys.ok_or_else(|| needed("keys"))?,
            peer: o.peer,
            listen: o.listen,
            discard_newer: o.discard_newer,
            control: o.control,
            hook: o.hook,
            hook_seconds: within("hook-seconds", o.hook_seconds, 30, 1, 3600)?,
            metrics: o.metrics,
            log_format: o.log_format.unwrap_or_default(),
            confine: !o.no_confine,
            timing,
            buffers,
            machine: o.machine.check(vm.as_deref())?,
        })
    }

    /// Refuses flags that do nothing in this role. One file may have the options of both roles.
    fn check_flags(&self, role: Role) -> Result<(), Error> {
        let (other, idle) = match role {
            Role::Primary => ("backup", [("listen", self.listen.is_some()), ("", false)]),
            Role::Backup => ("primary", [("peer", self.peer.is_some()), ("unprotected", self.unprotected)]),
        };
        match idle.into_iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) => Err(Error::config(
                field,
                format!("--{field} is for a {other}, and does nothing here: leave it out"),
            )),
            None => Ok(()),
        }
    }

    /// These options, with those of the file where an option is not given.
    fn over(self, file: PairOptions) -> PairOptions {
        PairOptions {
            name: self.name.or(file.name),
            store: self.store.or(file.store),
            keys: self.keys.or(file.keys),
            peer: self.peer.or(file.peer),
            listen: self.listen.or(file.listen),
            unprotected: self.unprotected || file.unprotected,
            discard_newer: self.discard_newer || file.discard_newer,
            control: self.control.or(file.control),
            hook: self.hook.or(file.hook),
            hook_seconds: self.hook_seconds.or(file.hook_seconds),
            metrics: self.metrics.or(file.metrics),
            log_format: self.log_format.or(file.log_format),
            no_confine: self.no_confine || file.no_confine,
            timeout_ms: self.timeout_ms.or(file.timeout_ms),
            heartbeat_ms: self.heartbeat_ms.or(file.heartbeat_ms),
            progress_timeout_ms: self.progress_timeout_ms.or(file.progress_timeout_ms),
            buffer_mib: self.buffer_mib.or(file.buffer_mib),
            lag_max_ms: self.lag_max_ms.or(file.lag_max_ms),
            lag_limit_ms: self.lag_limit_ms.or(file.lag_limit_ms),
            at_lag_limit: self.at_lag_limit.or(file.at_lag_limit),
            machine: self.machine.over(file.machine),
        }
    }
}

/// What tells the VMs of one store from those of others: the name of its cluster, or its prefix.
fn scope(store: Option<&str>) -> String {
    match store.unwrap_or_default().parse() {
        Ok(StoreUrl::Raft { cluster, .. }) => cluster.to_string(),
        Ok(StoreUrl::Etcd { prefix, .. } | StoreUrl::ZooKeeper { prefix, .. }) => prefix,
        // It is refused later.
        Err(_) => String::new(),
    }
}

/// Without a port no connection would ever come up.
fn check_peer(address: &str) -> Result<(), Error> {
    let port = address.rsplit_once(':').and_then(|(host, port)| Some(port).filter(|_| !host.is_empty()));
    if port.and_then(|port| port.parse::<u16>().ok()).is_some_and(|port| port > 0) {
        return Ok(());
    }
    let why = format!("{address:?} has no port: give HOST:PORT, as the backup's --listen has it");
    Err(Error::config("peer", why))
}

fn parse_listen(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "give an IP address of this host and a port, for example 192.0.2.2:7500")
}

fn read_file(path: &Path) -> Result<PairOptions, Error> {
    let unusable =
        |e: &dyn std::fmt::Display| Error::config("config", format!("cannot read {}: {e}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| unusable(&e))?;
    toml::from_str(&text).map_err(|e| unusable(&e))
}

/// The value of an option, or its default. The value has to be within `min` and `max`.
fn within(field: &str, given: Option<u64>, default: u64, min: u64, max: u64) -> Result<u64, Error> {
    let value = given.unwrap_or(default);
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(Error::config(field, format!("{value} is not in the range {min} to {max}")))
}

/// The value in ns of an option that is given in ms.
fn ms(field: &str, given: Option<u64>, default_ns: u64, min: u64, max: u64) -> Result<u64, Error> {
    Ok(within(field, given, default_ns / 1_000_000, min, max)? * 1_000_000)
}

fn timing(timeout: Option<u64>, beat: Option<u64>, progress: Option<u64>) -> Result<PairTiming, Error> {
    let default = PairTiming::default();
    let timeout_ns = ms("timeout-ms", timeout, default.timeout_ns, 40, 600_000)?;
    let beat_default = default.beat_interval_ns.min(timeout_ns / 4);
    let beat_interval_ns = ms("heartbeat-ms", beat, beat_default, 5, timeout_ns / 4_000_000)?;
    let progress_default = default.progress_timeout_ns.max(timeout_ns);
    let progress_timeout_ns =
        ms("progress-timeout-ms", progress, progress_default, timeout_ns / 1_000_000, 3_600_000)?;
    Ok(PairTiming { timeout_ns, beat_interval_ns, progress_timeout_ns, ..default })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_the_file_and_errors_name_the_option() {
        let file: PairOptions = toml::from_str(
            "name = 'web'\nstore = 's'\nkeys = 'k'\npeer = 'b:1'\ntimeout_ms = 400\n[machine]\nkernel = 'vmlinux'\n",
        )
        .unwrap();
        let check = |flags: PairOptions, role| flags.over(file.clone()).check(role);
        let none = PairOptions::default;
        let plan = check(PairOptions { timeout_ms: Some(800), ..none() }, Role::Primary).unwrap();
        assert_eq!((plan.name.as_str(), plan.timing.timeout_ns), ("web", 800_000_000));
        assert_eq!(plan.machine.kernel, PathBuf::from("vmlinux"));
        let fault = |flags, role| match check(flags, role) {
            Err(Error::Config { field, .. }) => field,
            _ => panic!("accepted"),
        };
        assert_eq!(fault(PairOptions { name: Some("a b".into()), ..none() }, Role::Primary), "name");
        assert_eq!(fault(PairOptions { heartbeat_ms: Some(101), ..none() }, Role::Primary), "heartbeat-ms");
        let late = PairOptions { progress_timeout_ms: Some(9), ..none() };
        assert_eq!(fault(late, Role::Primary), "progress-timeout-ms");
        assert_eq!(fault(PairOptions { unprotected: true, ..none() }, Role::Primary), "peer");
        for peer in ["host-b", "host-b:", "host-b:0", ":7500", "host-b:http"] {
            let flags = PairOptions { peer: Some(peer.into()), ..none() };
            assert_eq!(fault(flags, Role::Primary), "peer", "{peer}");
        }
        assert_eq!(fault(none(), Role::Backup), "listen");
        // A flag that does nothing is refused; the file may serve both roles.
        let listen = || PairOptions { listen: Some("192.0.2.1:1".parse().unwrap()), ..none() };
        let alone = |flags: PairOptions, role| match flags.with_file(role) {
            Err(Error::Config { field, why }) if why.contains("does nothing") => field,
            _ => String::new(),
        };
        assert_eq!(alone(listen(), Role::Primary), "listen");
        assert_eq!(alone(listen(), Role::Backup), "");
        assert_eq!(alone(PairOptions { peer: Some("b:1".into()), ..none() }, Role::Backup), "peer");
        assert_eq!(alone(PairOptions { unprotected: true, ..none() }, Role::Backup), "unprotected");
        assert!(toml::from_str::<PairOptions>("nmae = 'x'").unwrap_err().to_string().contains("nmae"));
    }
}
