//! virtio 1.2 over MMIO (version 2), with the split ring.

pub mod blk;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
