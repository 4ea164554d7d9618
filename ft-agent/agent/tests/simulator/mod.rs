//! One process, one seed: two hosts with the production agent, channel and gate, the store's production rule, a client,
//! and everything that can go wrong between them.
//!
//! The guest is a small deterministic machine whose outputs carry a hash of its whole history. The client numbers its
//! requests and repeats each until it is answered, as TCP would. The checker ([`checker`]) speaks for the client: what it
//! saw from both hosts together is one history of one machine.
//!
//! | module | what |
//! |---|---|
//! | [`world`] | time, and what happens when |
//! | [`host`] | a host's process: what a runtime does around the agent |
//! | [`guest`] | the machine |
//! | [`link`] | the connection between the hosts, byte by byte |
//! | [`faults`] | what goes wrong |
//! | [`checker`] | what must hold |

pub mod checker;
pub mod faults;
pub mod guest;
pub mod host;
pub mod link;
pub mod rng;
pub mod world;

pub use checker::Counts;
pub use world::run;
