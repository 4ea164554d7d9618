//! The deterministic machine of vmft: a vCPU, RAM and devices whose next state is a function of the state and
//! of the inputs at their positions.
//!
//! A [`Machine`] is made from a [`MachineConfig`] and a [`BootPlan`] and does no I/O: it is run until it stops,
//! and says why. A [`GuestLoop`] drives it between a [`Source`] of inputs and the outside.
//!
//! | module | what |
//! |---|---|
//! | [`machine`] | the machine: run, apply, digest |
//! | [`state`] | saving and restoring a machine |
//! | [`guest_loop`], [`source`] | the loop, and where inputs come from |
//! | [`record`], [`replay`], [`narrow`] | the log as it is written, as it is read, and where two readings part |
//! | [`inbox`], [`gate`] | how inputs get in from other threads, and when outputs get out |
//! | [`vcpu`] | engines |
//! | [`ram`], [`clock`], [`bus`], [`devices`] | what the machine consists of |
//! | [`boot`], [`config`] | what it starts from |

pub mod boot;
pub mod bus;
pub mod clock;
pub mod config;
pub mod devices;
pub mod gate;
pub mod guest_loop;
pub mod inbox;
pub mod machine;
pub mod narrow;
pub mod ram;
pub mod record;
pub mod replay;
pub mod source;
pub mod state;
pub mod vcpu;

pub use boot::{BootError, BootFile, BootFiles, BootPlan};
pub use config::{ConfigError, MachineConfig, MachineIdentity, Slot};
pub use guest_loop::GuestLoop;
pub use machine::{Machine, MachineError, Stop};
pub use source::{Live, Next, Outside, Source};
pub use vcpu::Engine;
