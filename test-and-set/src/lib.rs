//! The test-and-set store of vmft: when primary and backup lose each other, it says which one lives.
//!
//! # For users
//!
//! Three small processes, on hosts that do not fail together, hold one verdict for each pair. As long as two of them reach
//! each other there is an answer, and there is never a second one.
//!
//! ```text
//! vmft-store keys trial --members 1,2,3 --clients host-a,host-b
//! vmft-store serve --id 1 --listen 10.0.0.1:7400 --peers 1=10.0.0.1:7400,2=10.0.0.2:7400,3=10.0.0.3:7400 \
//!     --data /var/lib/vmft-store --keys trial/1            # and so on for 2 and 3, each on its host
//! vmft-store status --store 'raft://10.0.0.1:7400,10.0.0.2:7400,10.0.0.3:7400?keys=trial/host-a'
//! ```
//!
//! - **A trial** needs one member only: `--id 1 --peers 1=127.0.0.1:7400`.
//! - **Keys.** Each party has a certificate of its own and copies of those that it accepts; see [`keys`]. Copy `trial/1` to the
//!   first host, and so on. A client's certificate in `clients/`, or a member's in `members/`, is found while the store runs.
//! - **Members** change while it runs: put the new certificates in place, start the new one with `--join`, then
//!   `vmft-store member add --store … 4 10.0.0.4:7400`; `vmft-store member remove --store … 1`. A member that lost its data is
//!   refused by the others, because it has lost its votes with it: remove it, empty its `--data`, and add it anew.
//! - **Disk.** A member takes no more commands when less than 32 MiB are free beside room for a snapshot, and says so; what it has
//!   answered holds. `--metrics ADDR` serves Prometheus.
//! - **Your own etcd or ZooKeeper** serves as well: `etcd://HOST:PORT,…` or `zookeeper://HOST:PORT,…` in place of `raft://`; see
//!   [`url::StoreUrl`].
//!
//! # How it works
//!
//! ```text
//!  agent ── blocking ──┐                        ┌─ raft_client ── link ══ TLS 1.3 ══ server: connections ─ raft ─ log ─ disk
//!                      ├── store::TestAndSet ───┼─ etcd ──────┐                              │             │
//!  tests ── checker, ──┘    (the trait)         ├─ zookeeper ─┴─ cas                       peers ══ the other members
//!           conformance                         └─ fake                                       both apply: record::decide
//! ```
//!
//! - [`record`] is the rule: what a command does to a VM's record and what it answers, as a pure function. The server applies it in
//!   log order, the clients of etcd and ZooKeeper apply it and write the result by compare-and-set, the checker searches with it.
//!   Invariants: a generation has one holder, for ever; generation numbers only grow, and survive forgetting; a command that is
//!   answered `Stale` or `Refused` has changed nothing; every command may be repeated.
//! - [`store`] is the trait. A call ends at its deadline; an error is *unknown*, never *no*.
//! - [`wire`] describes the bytes of `raft://`; [`connection`] is one connection with any number of questions under way.
//! - [`server`] is one member. [`server::raft`] is the only module that names openraft; [`server::raft_log`] lets a leader write to its disk
//!   while it sends to the others; [`server::disk`] is on the disk (fsync) when it returns. A member is bound to its data: each one
//!   notes the data of the others at first contact, and lets nobody in who comes with other data.
//! - [`checker`] judges histories, [`conformance`] is what every store must pass.
//!
//! What openraft 0.9 does not do, done here: it resumes a leader's term after a restart and may then read an old state, so a
//! restarted leader is a candidate; it fsyncs before it sends, so the log goes around that; and it tells each commit in a call
//! that the next entry waits for, so the network puts the two together.
//!
//! A verdict is a chain of small steps in several processes, and waits for each thread to be woken: a member takes them on one
//! thread, and that thread asks for a short time [`time_slice`].

pub mod blocking;
mod cas;
pub mod checker;
pub mod conformance;
mod connect;
pub mod connection;
pub mod etcd;
pub mod fake;
pub mod keys;
pub mod raft_client;
pub mod server;
pub mod store;
pub mod time_slice;
pub mod tls;
pub mod url;
pub mod wire;
pub mod zookeeper;

pub use connect::connect;
pub use store_rule::{names, record};
