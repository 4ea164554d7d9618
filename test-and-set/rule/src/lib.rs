//! The rule of the test-and-set store, without I/O: [`names`] has its checked names and ids, [`record`] what a command
//! does to a VM's record and what it answers.
//!
//! The server, its clients and the agent's simulator apply the same rule.
#![forbid(unsafe_code)]

pub mod names;
pub mod record;
