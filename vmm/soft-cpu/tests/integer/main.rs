//! The integer instruction set, as small guest programs with the outcomes of the SDM.

#[path = "../guest/mod.rs"]
mod guest;

mod harness;
