//! Runs a guest with a device that answers every read and logs all accesses.

use soft_cpu::{CpuExit, RunLimit};

use crate::guest::*;

/// The answer to a read: the low byte of its address or port, and a fixed pattern in all other bytes.
pub fn value_at(addr: u64) -> u64 {
    0x5a5a_a5a5_3c3c_c300 | addr & 0xff
}

fn answer(question: CpuExit) -> u64 {
    match question {
        CpuExit::MmioRead { addr, .. } => value_at(addr),
        CpuExit::PioIn { port, .. } => value_at(port as u64),
        _ => 0,
    }
}

impl Guest {
    /// Continues to `until` instructions or the end (a store to [`END`]), whichever comes first. Adds the
    /// guest's questions to `log`. Returns false at the end.
    pub fn drive(&mut self, until: u64, log: &mut Vec<CpuExit>) -> bool {
        loop {
            let mut exit = Some(self.cpu.run(&mut self.ram, &RunLimit { until, interrupt_window: false }));
            while let Some(question) = exit.filter(CpuExit::is_question) {
                if matches!(question, CpuExit::MmioWrite { addr: END, .. }) {
                    return false;
                }
                log.push(question);
                exit = self.cpu.complete(&mut self.ram, answer(question));
            }
            match exit {
                None => {}
                Some(CpuExit::Reached) => return true,
                Some(exit) => panic!("{exit:?}"),
            }
        }
    }

    /// Runs from the start to the end; returns the guest's questions.
    pub fn talk(&mut self) -> Vec<CpuExit> {
        let mut log = Vec::new();
        self.cpu.restore(&self.state);
        assert!(!self.drive(1_000_000, &mut log), "the program does not end");
        self.state = self.cpu.save();
        log
    }
}
