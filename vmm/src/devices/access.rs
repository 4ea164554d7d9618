//! What a device works with while it serves an access or an input, and what that leads to besides its reply.

use entry::{DiskRequest, Output, Question};

use crate::ram::GuestMemory;

/// How the guest asked for the end of its run, or of the present boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// A power-off, through [`super::POWER_OFF_PORT`].
    PowerOff,
    /// A reset, through the keyboard controller.
    Reset,
}

/// What an access or an input led to, besides its reply.
#[derive(Debug, Default)]
pub struct Effects {
    /// Outputs that leave the machine, in order.
    pub outputs: Vec<Output>,
    /// Requests to disks, in order.
    pub disk: Vec<DiskRequest>,
    /// A question to be answered before the guest goes on.
    pub question: Option<Question>,
    /// Power-off or reset.
    pub request: Option<PowerRequest>,
}

/// What a device works with: guest time, guest memory, and the place for its effects.
pub struct DeviceContext<'a> {
    /// Guest time in ns.
    pub now_ns: u64,
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// What the access or input leads to.
    pub effects: &'a mut Effects,
}
