//! The test-and-set store of vmft.
