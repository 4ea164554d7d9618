//! A log in memory, and its replay. ft-agent's tests include this file too.

use std::convert::Infallible;

use entry::log::Record;
use entry::{DiskRequest, DiskResult, Output, Position};

use super::{GuestLoop, Machine, RecordSink, Records, Replayer, Standby};

/// A log in memory.
#[derive(Default)]
pub struct MemoryLog(pub Vec<Record>);

impl RecordSink for MemoryLog {
    type Error = Infallible;

    fn append(&mut self, record: &Record) -> Result<(), Infallible> {
        self.0.push(record.clone());
        Ok(())
    }

    fn on_turn(&mut self, _at: Position) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Yields the records of a log in memory.
pub struct MemoryRecords(pub std::vec::IntoIter<Record>);

impl Records for MemoryRecords {
    type Error = Infallible;

    fn next(&mut self) -> Result<Option<Record>, Infallible> {
        Ok(self.0.next())
    }
}

/// A guest without a disk.
pub struct NoDisk;

impl Standby for NoDisk {
    type Error = Infallible;

    fn start(&mut self, request: DiskRequest) -> Result<(), Infallible> {
        panic!("{request:?}")
    }

    fn finish(&mut self, _slot: u8, _id: u64) -> Result<Option<DiskResult>, Infallible> {
        Ok(None)
    }

    fn output(&mut self, _output: Output) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A replay of these records.
pub fn replay(machine: Machine, log: Vec<Record>) -> GuestLoop<Replayer<MemoryRecords, NoDisk>> {
    GuestLoop { machine, source: Replayer::new(MemoryRecords(log.into_iter()), NoDisk) }
}
