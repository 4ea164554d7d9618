//! The rule of the test-and-set store, without I/O: [`names`] defines its checked names and ids, [`record`] defines what a
//! command does to a VM's record, who may give it, and what the store replies; [`state`] has the records of all VMs.
//!
//! The server, the clients of etcd and ZooKeeper, and the agent's simulator all apply this rule.
#![forbid(unsafe_code)]

pub mod names;
mod party;
pub mod record;
pub mod state;
