//! The soft CPU against the host's own.
//!
//! Random instruction sequences run twice from the same state, natively in a child process ([`native`]) and on
//! [`soft_cpu`] ([`soft`]), in the same small address space ([`layout`]); whatever both define must agree
//! ([`compare`]). A case is made from a 64-bit seed alone ([`generate`]), so that it can be run again; one that
//! differs is reduced to the instructions that matter ([`shrink`]).
//!
//! What is left out, and why: [`catalogue::Excluded`] for instructions, [`flow::undefined_flags`] for flags,
//! x87 instruction and data pointers (they differ between models), RF, and the P bit of page faults in the
//! host's kernel. Where a host's vendor does otherwise than Intel, which the soft CPU follows, [`vendor`] has
//! the differences, and cases that show one are counted as not compared.

pub mod case;
pub mod catalogue;
pub mod compare;
pub mod flow;
pub mod generate;
pub mod layout;
pub mod native;
mod operands;
pub mod report;
pub mod rng;
pub mod run;
pub mod shrink;
pub mod soft;
pub mod state;
pub mod values;
pub mod vendor;
