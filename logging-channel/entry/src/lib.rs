//! Log entries of vmft.
