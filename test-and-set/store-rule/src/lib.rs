//! The rule of the test-and-set store, without I/O: [`names`] defines its checked names and ids, [`record`] defines what a
//! command does to a VM's record and what the store replies.
//!
//! The server, the clients of etcd and ZooKeeper, and the agent's simulator all apply this rule.
#![forbid(unsafe_code)]

pub mod names;
pub mod record;
