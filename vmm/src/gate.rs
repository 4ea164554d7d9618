//! The output gate: outputs wait here, in order, until they may leave. It does no I/O: its owner decides when outputs may
//! leave, and sends them.

use std::collections::VecDeque;

use entry::Output;

/// Outputs that have been recorded and not yet released. Its counters count outputs since the machine began.
#[derive(Debug, Default)]
pub struct Gate {
    held: VecDeque<Output>,
    released: u64,
}

impl Gate {
    /// Holds an output that was recorded.
    pub fn hold(&mut self, output: Output) {
        self.held.push_back(output);
    }

    /// Number of outputs that were recorded.
    pub fn recorded(&self) -> u64 {
        self.released + self.held.len() as u64
    }

    /// Number of outputs that were released.
    pub fn released(&self) -> u64 {
        self.released
    }

    /// Releases the next output if it is among the first `limit`.
    pub fn release(&mut self, limit: u64) -> Option<Output> {
        if self.released >= limit {
            return None;
        }
        let output = self.held.pop_front()?;
        self.released += 1;
        Some(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_leave_in_order_and_not_before_the_limit() {
        let frame = |n| Output::Frame { slot: 0, bytes: vec![n] };
        let mut gate = Gate::default();
        (0..3).for_each(|n| gate.hold(frame(n)));
        assert_eq!((gate.recorded(), gate.released()), (3, 0));
        assert_eq!(gate.release(0), None);
        assert_eq!(gate.release(2), Some(frame(0)));
        assert_eq!(gate.release(2), Some(frame(1)));
        assert_eq!(gate.release(2), None);
        assert_eq!(gate.release(u64::MAX), Some(frame(2)));
        assert_eq!(gate.release(u64::MAX), None);
        assert_eq!((gate.recorded(), gate.released()), (3, 3));
    }
}
