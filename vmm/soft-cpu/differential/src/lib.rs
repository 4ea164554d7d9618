//! Compares the soft CPU with the host's CPU.
//!
//! Random instruction sequences run twice from the same state, natively in a child process ([`native`]) and
//! on [`soft_cpu`] ([`soft`]), in the same small address space ([`layout`]); whatever the architecture
//! defines must agree ([`compare`]). A case is generated from a 64-bit seed only ([`generate`]), so that it
//! can be run again. A case on which the CPUs differ is reduced to the instructions that matter ([`shrink`]).
//!
//! Not compared are the instructions of [`catalogue::Excluded`], the flags of [`flow::undefined_flags`], the
//! x87's instruction and data pointers (they differ between models), RF, and the P bit of page faults in the
//! host's kernel. The soft CPU follows Intel's processors; the differences of other vendors are in
//! [`vendor`], and cases that show one are counted as not compared.

pub mod case;
pub mod catalogue;
pub mod compare;
mod draft;
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
