//! The capabilities of root, which a confined process does not need.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// Takes all capabilities but these away from the calling thread, and from the threads that it starts later. Returns which of
/// them remain: none, if the user had none.
///
/// # Errors
/// The kernel refuses, which it does not do to a thread that gives up rights.
pub fn keep(kept: CapabilitySet) -> io::Result<CapabilitySet> {
    let now = capabilities(None)?;
    let remaining = now.permitted.intersection(kept);
    let effective = now.effective.intersection(kept);
    let sets = CapabilitySets { effective, permitted: remaining, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets)?;
    Ok(remaining)
}
