//! The deterministic machine of vmft.
