//! What the machine does at an instruction of the kernel that was rewritten to be an exit ([`crate::boot::rewrite`]).

use entry::{End, Question};

use super::{Machine, MachineError, Stop};
use crate::boot::rewrite::{self, Site};
use crate::vcpu::Exit;

impl Machine {
    /// Serves an OUT to the port of rewritten instructions. Returns the next exit of that OUT, if it makes one, and otherwise the
    /// question that the rewritten instruction asks, if there was one at that address.
    pub(super) fn rewritten_exit(&mut self) -> Result<(Option<Exit>, Option<Stop>), MachineError> {
        self.counts.pio += 1;
        let mut next = self.vcpu.complete(&mut self.ram, 0)?;
        if next.is_none() {
            next = self.vcpu.finish_instruction(&mut self.ram)?;
        }
        if let Some(Exit::Shutdown) = next {
            return Ok((None, Some(Stop::End(End::TripleFault))));
        }
        let site = if next.is_none() { self.site()? } else { None };
        let question = site.map(|site| site.question(self.time_ns()));
        self.effects.question.clone_from(&question);
        Ok((next, question.map(Stop::Question)))
    }

    /// The rewritten instruction whose OUT was executed last.
    fn site(&mut self) -> Result<Option<Site>, MachineError> {
        let Some(rewritten) = self.plan.rewritten() else { return Ok(None) };
        let mut rip = 0;
        self.vcpu.change_registers(&mut |registers| rip = registers.rip)?;
        Ok(rewritten.sites.find(rip.wrapping_sub(rewrite::OUT)))
    }

    /// Does what the rewritten instruction would have done, with the answer to its question as its value.
    pub(super) fn emulate(&mut self, question: Question, mut value: u64) -> Result<(), MachineError> {
        let Some(site) = self.site()? else { return Err(MachineError::WrongAnswer(question)) };
        if let Question::Time { .. } = question {
            self.raise_time(value);
            value = self.time_ns();
        }
        Ok(self.vcpu.change_registers(&mut |registers| site.apply(value, registers))?)
    }
}
