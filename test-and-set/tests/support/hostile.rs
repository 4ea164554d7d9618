//! Clients that send garbage, oversized or slow data, with and without accepted certificates, while a good client keeps working.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use test_and_set::keys::{self, Keys};
use test_and_set::names::{Generation, VmName};
use test_and_set::record::Verdict;
use test_and_set::store::TestAndSet;
use test_and_set::tls;
use test_and_set::wire::{self, StoreHello, Welcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::latency::{Sample, open};
use super::{Cluster, client};

/// The largest number of hostile clients that are connected at once.
const AT_ONCE: usize = 600;

/// The result of [`run`].
pub struct HostileReport {
    pub clients: usize,
    pub kinds: Vec<(&'static str, usize)>,
    pub verdicts: Sample,
    /// The server's resident memory in KiB: before, and at most.
    pub memory_kib: (u64, u64),
    pub took: Duration,
}

impl std::fmt::Display for HostileReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (before, most) = self.memory_kib;
        writeln!(f, "{} hostile clients in {:.0?}: {:?}", self.clients, self.took, self.kinds)?;
        write!(
            f,
            "meanwhile verdicts: {}; server memory {before} KiB before, {most} KiB at most",
            self.verdicts
        )
    }
}

/// A field of /proc/PID/status, in KiB.
pub fn memory_kib(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the server runs");
    let line = status.lines().find(|line| line.starts_with(field)).expect("the field");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

const KINDS: [&str; 9] = [
    "silent",
    "garbage",
    "half a handshake",
    "unknown certificate",
    "wrong magic",
    "wrong version",
    "oversized frame",
    "garbage frame",
    "slow frame",
];

struct Attack {
    address: String,
    accepted: TlsConnector,
    unknown: TlsConnector,
}

impl Attack {
    async fn connect(&self, tls: &TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(&self.address).await?;
        tls.connect("vmft-store".try_into().expect("a name"), tcp).await
    }

    /// A client with an accepted certificate, after its greeting.
    async fn greeted(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let mut stream = self.connect(&self.accepted).await?;
        let hello = StoreHello { cluster: "vmft".parse().expect("a name"), member: None };
        let greet = async {
            wire::write_greeting(&mut stream, &hello).await?;
            wire::read_greeting::<Welcome>(&mut stream).await
        };
        greet.await.map_err(std::io::Error::other)?;
        Ok(stream)
    }

    /// Runs one hostile client until the server closes the connection or it has done enough. An error is as good as success.
    async fn once(&self, kind: &str, garbage: &[u8]) -> std::io::Result<()> {
        let hold = Duration::from_millis(500);
        match kind {
            "silent" => {
                let _tcp = TcpStream::connect(&self.address).await?;
                tokio::time::sleep(hold).await;
            }
            "garbage" => {
                let mut tcp = TcpStream::connect(&self.address).await?;
                tcp.write_all(garbage).await?;
                tcp.read_to_end(&mut vec![]).await?;
            }
            "half a handshake" => {
                let mut tcp = TcpStream::connect(&self.address).await?;
                // A TLS record header that announces more bytes than follow.
                tcp.write_all(&[22, 3, 1, 64, 0, 1]).await?;
                tokio::time::sleep(hold).await;
            }
            "unknown certificate" => {
                let mut stream = self.connect(&self.unknown).await?;
                stream.read_to_end(&mut vec![]).await?;
            }
            "wrong magic" | "wrong version" => {
                let mut stream = self.connect(&self.accepted).await?;
                let head: &[u8] = if kind == "wrong magic" {
                    b"GET / HTTP/1.1\r\n\r\n"
                } else {
                    b"VMTS\xff\xff\xff\xff\0\0"
                };
                stream.write_all(head).await?;
                stream.read_to_end(&mut vec![]).await?;
            }
            "oversized frame" => {
                let mut stream = self.greeted().await?;
                stream.write_all(&u32::MAX.to_le_bytes()).await?;
                stream.write_all(garbage).await?;
                stream.read_to_end(&mut vec![]).await?;
            }
            "garbage frame" => {
                let mut stream = self.greeted().await?;
                stream.write_all(&(garbage.len() as u32).to_le_bytes()).await?;
                stream.write_all(garbage).await?;
                stream.read_to_end(&mut vec![]).await?;
            }
            _ => {
                let mut stream = self.greeted().await?;
                stream.write_all(&60_000u32.to_le_bytes()).await?;
                for byte in garbage.iter().take(5) {
                    stream.write_all(&[*byte]).await?;
                    tokio::time::sleep(hold / 5).await;
                }
            }
        }
        Ok(())
    }
}

/// Opens `connections` connections of clients that use the keys in `keys`, one after the other, and keeps them. Returns them with
/// whether each was admitted.
pub async fn hold(
    cluster: &Cluster,
    keys: &std::path::Path,
    connections: usize,
) -> Vec<(TlsStream<TcpStream>, bool)> {
    let connector = tls::connector(&Arc::new(Keys::load(keys).expect("keys"))).expect("TLS");
    let mut held = vec![];
    for _ in 0..connections {
        let tcp = TcpStream::connect(cluster.address(1)).await.expect("a connection");
        let name = "vmft-store".try_into().expect("a name");
        let mut stream = connector.connect(name, tcp).await.expect("a handshake");
        let hello = StoreHello { cluster: "vmft".parse().expect("a name"), member: None };
        wire::write_greeting(&mut stream, &hello).await.expect("to greet");
        let welcome = wire::read_greeting::<Welcome>(&mut stream).await.expect("a welcome").1;
        held.push((stream, welcome.refused.is_none()));
    }
    held
}

/// Runs `clients` hostile clients against one member, and measures the latency of a good client meanwhile.
pub fn run(clients: usize) -> HostileReport {
    let cluster = Cluster::start(1);
    let strangers = tempfile::tempdir().expect("a directory");
    keys::make_set(strangers.path(), &[1], &["stranger".into()], &[]).expect("keys");
    // The unknown client accepts the server's certificate, but not the other way round.
    let known = strangers.path().join("stranger/members/1.crt");
    std::fs::copy(cluster.keys("client").join("members/1.crt"), known).expect("a copy");
    let connector = |dir| tls::connector(&Arc::new(Keys::load(dir).expect("keys"))).expect("TLS");
    let attack = Arc::new(Attack {
        address: cluster.address(1),
        accepted: connector(&cluster.keys("client")),
        unknown: connector(&strangers.path().join("stranger")),
    });
    let pid = cluster.nodes[0].as_ref().expect("a member").0.id();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let begun = Instant::now();
    let (counts, verdicts, before) = runtime.block_on(async {
        let store = client(&cluster.url());
        let done = Arc::new(AtomicBool::new(false));
        let first: VmName = "good".parse().expect("a name");
        open(&*store, &first).await;
        let before = memory_kib(pid, "VmRSS:");
        let good = tokio::spawn(take_until(done.clone(), store));
        let counts = attack_with(attack, clients).await;
        done.store(true, Relaxed);
        let took = good.await.expect("the good client");
        (counts, Sample::new(took), before)
    });
    assert_eq!(counts.iter().sum::<usize>(), clients, "every hostile client must have ended");
    let kinds = KINDS.into_iter().zip(counts).collect();
    HostileReport {
        clients,
        kinds,
        verdicts,
        memory_kib: (before, memory_kib(pid, "VmHWM:")),
        took: begun.elapsed(),
    }
}

/// Takes new VMs until `done` is set; returns how long each verdict took.
async fn take_until(done: Arc<AtomicBool>, store: Arc<dyn TestAndSet>) -> Vec<Duration> {
    let mut took = vec![];
    while !done.load(Relaxed) {
        let vm = format!("good-{}", took.len()).parse().expect("a name");
        let who = open(&*store, &vm).await;
        let asked = Instant::now();
        let verdict = store.take(&vm, Generation::FIRST, who, asked + Duration::from_secs(10)).await;
        assert!(matches!(verdict, Verdict::Won), "{verdict:?}");
        took.push(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    took
}

/// Runs hostile clients of all kinds in turn; returns how many of each kind have ended.
async fn attack_with(attack: Arc<Attack>, clients: usize) -> Vec<usize> {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let counts = Arc::new([const { AtomicUsize::new(0) }; KINDS.len()]);
    for i in 0..clients {
        let slot = slots.clone().acquire_owned().await.expect("a slot");
        let (attack, counts) = (attack.clone(), counts.clone());
        tokio::spawn(async move {
            let kind = i % KINDS.len();
            let garbage: [u8; 64] = rand::random();
            let once = attack.once(KINDS[kind], &garbage);
            // It must end; how it ends does not matter.
            tokio::time::timeout(Duration::from_secs(15), once)
                .await
                .expect("the server ends bad connections")
                .ok();
            counts[kind].fetch_add(1, Relaxed);
            drop(slot);
        });
    }
    drop(slots.acquire_many(AT_ONCE as u32).await.expect("all slots"));
    counts.iter().map(|count| count.load(Relaxed)).collect()
}
