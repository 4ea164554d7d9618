//! What no compiler checks about the sources of vmft, counted. `tests/tidy.rs` says which counts must be zero;
//! `cargo run -p tidy [CHECKOUT]` prints them, also for an older checkout.
//!
//! Only text is read: nothing of the project is built or run.

pub mod arrows;
pub mod crates;
pub mod documents;
pub mod items;
pub mod pure;
pub mod sources;
pub mod words;

/// A finding: where, and what.
pub type Finding = (String, String);
