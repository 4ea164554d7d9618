//! The test-and-set store of vmft: when primary and backup lose each other, it says which one lives.
//!
//! # For users
//!
//! Three small processes, on hosts that do not fail together, store one verdict for each pair. As long as two of them reach each
//! other there is an answer, and never a second one.
//!
//! ```text
//! vmft-store keys set trial --members 1,2,3 --hosts host-a,host-b --operators admin
//! vmft-store serve --id 1 --listen 10.0.0.1:7400 --peers 1=10.0.0.1:7400,2=10.0.0.2:7400,3=10.0.0.3:7400 \
//!     --data /var/lib/vmft-store --keys trial/1            # and so on for 2 and 3, each on its host
//! vmft-store status --store 'raft://10.0.0.1:7400,10.0.0.2:7400,10.0.0.3:7400?keys=trial/admin'
//! ```
//!
//! - **For a trial** one member is enough: `--id 1 --peers 1=127.0.0.1:7400`.
//! - **Keys.** Each party has its own certificate and copies of those that it accepts; see [`keys`]. Copy `trial/1` to the first
//!   host, and so on. Certificates can be added and removed while the store runs.
//! - **Roles.** A host takes, opens and ends only for its own sides of pairs; an operator forgets VMs and changes the members. Each
//!   member's standard output is an audit of that ([`server::audit`]).
//! - **Members** can be changed while the store runs: put the new certificates in place, start the new member with `--join`, then
//!   `vmft-store member add --store … 4 10.0.0.4:7400`; `vmft-store member remove --store … 1`. A member that lost its data is
//!   refused by the others, because it has lost its votes, too: remove it, empty its `--data`, and add it again.
//! - **Backup.** `vmft-store backup` saves the records of all VMs, and `vmft-store restore` makes a new store of them; see [`backup`].
//!   An old copy of a member's directory is refused by the others, as far as they know that it is old; see [`server::marks`].
//! - **Disk.** A member accepts no commands when less than 32 MiB are free beside the room for a snapshot, and says so; earlier
//!   answers stay valid. `--metrics ADDR` serves metrics for Prometheus.
//! - **Your own etcd or ZooKeeper** can be used, too: `etcd://HOST:PORT,…` or `zookeeper://HOST:PORT,…` in place of `raft://`; see
//!   [`url::StoreUrl`].
//!
//! # How it works
//!
//! ```text
//!  agent ── blocking ──┐                        ┌─ raft_client ── connection ══ TLS 1.3 ══ server: acceptor ─ raft ─ raft_log ─ disk
//!                      ├── store::TestAndSet ───┼─ etcd ──────┐                                │
//!  tests ── checker, ──┘    (the trait)         ├─ zookeeper ─┴─ cas                         peers ══ the other members
//!           conformance                         └─ fake              raft, cas and fake apply record::decide
//! ```
//!
//! - [`record`] is the rule: what a command does to a VM's record and the store's reply, as a pure function. The server applies it in
//!   log order; the clients of etcd and ZooKeeper apply it and write the result by compare-and-set; the checker searches with it.
//!   Invariants: a generation has one holder, for ever; generation numbers only grow, also when a VM is forgotten; a command with the
//!   reply `Stale` or `Refused` has changed nothing; only a member's host is answered `Won`; every command may be repeated.
//! - [`store`] is the trait. A call ends at its deadline; an error means *unknown*, never *no*.
//! - [`wire`] defines the protocol of `raft://`, whose versions are in [`versions`]; [`connection`] is one connection with any number of requests at once.
//! - [`server`] is one member. [`server::raft`] is the only module that names openraft; [`server::raft_log`] lets a leader write to its
//!   disk while it sends to the others; a change in [`server::disk`] is on the disk (fsync) when the call returns, and a second time in
//!   [`server::journal`], so that damage is never taken for a torn write. A member is bound to its data: the others
//!   record its id when it first connects, and how far it has come, and refuse a member that comes with other data or with less;
//!   see [`server::marks`] and [`server::peers`].
//! - [`checker`] checks histories; [`conformance`] is the suite that every store must pass.
//!
//! Three shortcomings of openraft 0.9 are worked around. It lets a restarted leader resume its term and then read an old state, so a
//! restarted leader becomes a candidate. It sends an entry only after its own fsync, which [`server::raft_log`] avoids. And it sends
//! each commit index in a request for which the next entry has to wait, so the network module sends the two together.
//!
//! A verdict is a chain of small steps in several processes, and each wake-up of a thread costs time: so a member runs on one thread,
//! with a short [`time_slice`].

pub mod backup;
pub mod blocking;
mod cas;
mod chain;
pub mod checker;
pub mod client_keys;
pub mod conformance;
mod connect;
pub mod connection;
pub mod etcd;
pub mod fake;
#[cfg(test)]
mod golden_tests;
pub mod keeper;
pub mod keys;
pub mod pending;
pub mod private_file;
pub mod raft_client;
pub mod refusal_log;
pub mod server;
pub mod store;
pub mod time_slice;
pub mod tls;
pub mod url;
pub mod versions;
pub mod wire;
pub mod zookeeper;
pub mod zookeeper_error;

pub use connect::connect;
pub use store_rule::{names, record, state};
