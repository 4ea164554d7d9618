//! Rules that a test leaves out, to show what they prevent: `VMFT_LEAVE_OUT=NAME`. A release build has none of this code.

#[cfg(not(debug_assertions))]
pub use nothing::is_left_out;
#[cfg(debug_assertions)]
pub use something::is_left_out;

#[cfg(debug_assertions)]
mod something {
    /// Whether a test leaves out this rule.
    pub fn is_left_out(rule: &str) -> bool {
        std::env::var_os("VMFT_LEAVE_OUT").is_some_and(|name| name == rule)
    }
}

#[cfg(not(debug_assertions))]
mod nothing {
    /// No rule is ever left out.
    pub fn is_left_out(_rule: &str) -> bool {
        false
    }
}
