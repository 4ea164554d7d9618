//! The outside of a test's machine.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use entry::{Answer, Console, DiskRequest, Input, Output, Position, Question};
use vmm::machine::StateDigest;
use vmm::source::Outside;
use vmm::vcpu::Kick;

/// An outside that types, and whose clock moves forward each time it is read.
#[derive(Clone, Default)]
pub struct World {
    /// What is typed, and after how many polls.
    pub typing: VecDeque<(u32, Vec<u8>)>,
    /// Number of polls so far.
    pub polls: u32,
    pub now_ns: u64,
    pub clock_step_ns: u64,
    pub printed: Vec<u8>,
    /// The last answer to a question for the time or a random number. Each answer is larger than the last by a third.
    pub told: Option<u64>,
    /// During this number of further polls, kicks the guest at about half of them.
    pub kicks: Option<(u32, Arc<dyn Kick>)>,
}

impl Outside for World {
    type Error = Infallible;

    fn poll(&mut self, takes: &mut dyn FnMut(&Input) -> bool) -> Result<Option<Input>, Infallible> {
        self.polls += 1;
        if let Some((left @ 1.., kicker)) = &mut self.kicks {
            *left -= 1;
            if self.polls.wrapping_mul(0x9e37_79b9) >> 31 == 0 {
                kicker.kick();
            }
        }
        if self.typing.front().is_none_or(|(look, _)| *look > self.polls) {
            return Ok(None);
        }
        let bytes = self.typing[0].1.clone();
        let input = Input::Console { console: Console::Serial, bytes };
        Ok(takes(&input).then(|| {
            self.typing.pop_front();
            input
        }))
    }

    fn stop_requested(&mut self) -> bool {
        false
    }

    fn time_ns(&mut self) -> Option<u64> {
        self.now_ns += self.clock_step_ns;
        (self.clock_step_ns > 0).then_some(self.now_ns)
    }

    fn wait(&mut self, until_ns: Option<u64>) -> Result<(), Infallible> {
        // Wakes early, as an outside may.
        let until_ns = until_ns.expect("the timer of this guest always runs");
        self.now_ns += (until_ns - self.now_ns).div_ceil(2);
        Ok(())
    }

    fn answer(&mut self, _at: Position, question: &Question) -> Result<Answer, Infallible> {
        let Some(told) = &mut self.told else { panic!("{question:?}") };
        *told += *told / 3 + 1;
        Ok(Answer::Value(*told))
    }

    fn send(&mut self, output: Output) -> Result<(), Infallible> {
        let Output::Console { bytes, .. } = output else { panic!("{output:?}") };
        self.printed.extend(bytes);
        Ok(())
    }

    fn disk(&mut self, request: DiskRequest) -> Result<(), Infallible> {
        panic!("{request:?}")
    }

    fn digest(&mut self, _at: Position, _digest: StateDigest) -> Result<(), Infallible> {
        Ok(())
    }
}
