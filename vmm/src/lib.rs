//! The deterministic machine of vmft: a vCPU, RAM and devices whose next state is a function of the state and
//! of the inputs at their positions.
//!
//! A [`Machine`] is made from a [`MachineConfig`] and a [`BootPlan`]. It does no I/O: it runs until it stops, and returns
//! why. A [`GuestLoop`] drives it, with inputs from a [`Source`].
//!
//! | module | content |
//! |---|---|
//! | [`machine`] | the machine: run, apply, digest |
//! | [`state`] | saving and restoring a machine |
//! | [`guest_loop`], [`source`] | the loop that runs the guest, and where its inputs come from |
//! | [`record`], [`replay`], [`bisect`] | writing the log, replaying it, and finding the first difference between two replays |
//! | [`inbox`], [`gate`] | inputs from other threads, and outputs that wait for their release |
//! | [`vcpu`] | engines |
//! | [`ram`], [`clock`], [`bus`], [`devices`] | what the machine consists of |
//! | [`boot`], [`config`] | what the machine starts from |

pub mod bisect;
pub mod boot;
pub mod bus;
pub mod clock;
pub mod config;
pub mod devices;
mod digest;
pub mod gate;
pub mod guest_loop;
pub mod inbox;
pub mod machine;
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
