//! One process, one seed: two hosts with the production agent, channel and gate, the store's production rule,
//! a client, and everything that can go wrong between them.
//!
//! The guest is a small deterministic machine whose outputs carry a hash of its whole history. The client
//! numbers its requests and repeats each one until it is answered, as TCP would. The checker ([`checker`])
//! judges from the client's point of view: the outputs that it saw from both hosts together must be one
//! history of one machine.
//!
//! | module | contents |
//! |---|---|
//! | [`world`] | the simulated time and the queue of events |
//! | [`sim_event`] | the events |
//! | [`host`], [`process`] | a host's process: what the `vmft` program does around the agent |
//! | [`guest`] | the machine |
//! | [`link`], [`network`] | the connection between the hosts, byte by byte |
//! | [`store`], [`store_members`] | questions on their way to the store and back; its three members |
//! | [`client`] | the client |
//! | [`faults`], [`injection`] | what goes wrong, and how |
//! | [`checker`] | what must hold |

pub mod checker;
pub mod client;
pub mod faults;
pub mod guest;
pub mod host;
pub mod injection;
pub mod link;
pub mod network;
pub mod process;
pub mod rng;
pub mod sim_event;
pub mod store;
pub mod store_members;
pub mod world;

pub use checker::Counts;
pub use world::run;

/// A millisecond, in ns.
pub const MS: u64 = 1_000_000;
