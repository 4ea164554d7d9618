//! Runs a guest with a device behind it that answers every read and notes everything.

use vmft_soft_cpu::{Exit, RunLimit};

use crate::guest::*;

/// What a read gives: the low bytes of its address or port, in every byte but the lowest also a fixed pattern.
pub fn value_at(addr: u64) -> u64 {
    0x5a5a_a5a5_3c3c_c300 | addr & 0xff
}

fn answer(question: Exit) -> u64 {
    match question {
        Exit::MmioRead { addr, .. } => value_at(addr),
        Exit::PioIn { port, .. } => value_at(port as u64),
        _ => 0,
    }
}

impl Guest {
    /// Runs on to `until` instructions or the end (a store to [`END`]), whichever comes first. Adds what the guest
    /// asked to `log`. False: the end.
    pub fn drive(&mut self, until: u64, log: &mut Vec<Exit>) -> bool {
        loop {
            let mut exit = Some(self.cpu.run(&mut self.ram, &RunLimit { until, interrupt_window: false }));
            while let Some(question) = exit.filter(Exit::is_question) {
                if matches!(question, Exit::MmioWrite { addr: END, .. }) {
                    return false;
                }
                log.push(question);
                exit = self.cpu.complete(&mut self.ram, answer(question));
            }
            match exit {
                None => {}
                Some(Exit::Reached) => return true,
                Some(exit) => panic!("{exit:?}"),
            }
        }
    }

    /// Runs from the start to the end and gives what the guest asked.
    pub fn talk(&mut self) -> Vec<Exit> {
        let mut log = Vec::new();
        self.cpu.restore(&self.state);
        assert!(!self.drive(1_000_000, &mut log), "the program does not end");
        self.state = self.cpu.save();
        log
    }
}
