//! The one loop that runs a guest, wherever its inputs come from.

use entry::{End, Position};

use crate::machine::{Machine, MachineError, Stop};
use crate::source::{AfterEnd, Next, Source};

/// How a turn of the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do.
    Again,
    /// The source asked for a pause.
    Paused,
    /// The guest's run is over, for this reason.
    Finished(End),
}

/// The loop cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LoopError<E: std::error::Error> {
    /// The machine or its engine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The source failed.
    #[error(transparent)]
    Source(E),
}

/// A machine and the source of its inputs. To go live, the same machine gets another source.
pub struct GuestLoop<S> {
    /// The machine.
    pub machine: Machine,
    /// Its source.
    pub source: S,
}

impl<S: Source> GuestLoop<S> {
    /// Runs until the source asks for a pause or the guest ends.
    ///
    /// # Errors
    /// Those of the machine and of the source.
    pub fn run(&mut self) -> Result<Turn, LoopError<S::Error>> {
        loop {
            match self.run_once()? {
                Turn::Again => {}
                turn => return Ok(turn),
            }
        }
    }

    /// Does the next thing that the source asks for.
    ///
    /// # Errors
    /// Those of the machine and of the source.
    pub fn run_once(&mut self) -> Result<Turn, LoopError<S::Error>> {
        // If the source had no answer the last time, the machine is in the middle of an instruction.
        if let Some(stop) = self.machine.finish_instruction()? {
            return self.handle_stop(stop);
        }
        // A machine that was paused between two positions first runs to the next one.
        if self.machine.is_between_positions() {
            return self.run_to(Some(Position::exact(self.machine.position().count + 1)));
        }
        match self.source.next(&self.machine).map_err(LoopError::Source)? {
            Next::Apply(input) => self.machine.apply(input),
            Next::Run { until } => return self.run_to(until),
            Next::Digest => self.take_digest()?,
            Next::Pause => return Ok(Turn::Paused),
        }
        self.report_to_source()?;
        Ok(Turn::Again)
    }

    fn run_to(&mut self, until: Option<Position>) -> Result<Turn, LoopError<S::Error>> {
        loop {
            match self.machine.run(until)? {
                Stop::Between => {
                    self.report_to_source()?;
                    if !self
                        .source
                        .kicked_between_positions(self.machine.position())
                        .map_err(LoopError::Source)?
                    {
                        return Ok(Turn::Paused);
                    }
                }
                stop => return self.handle_stop(stop),
            }
        }
    }

    fn handle_stop(&mut self, stop: Stop) -> Result<Turn, LoopError<S::Error>> {
        // What left the machine before the stop is reported before it.
        self.report_to_source()?;
        let at = self.machine.position();
        match stop {
            Stop::Reached | Stop::Kicked | Stop::Between | Stop::Halted | Stop::Outputs => {}
            Stop::Question(mut question) => loop {
                let Some(answer) = self.source.answer(at, &question).map_err(LoopError::Source)? else {
                    return Ok(Turn::Paused);
                };
                self.machine.answer(answer)?;
                // There may be several questions at one position, and the source is called at instruction boundaries only.
                match self.machine.finish_instruction()? {
                    Some(Stop::Question(next)) => question = next,
                    Some(stop) => return self.handle_stop(stop),
                    None => break self.report_to_source()?,
                }
            },
            Stop::End(end) => match self.source.ended(at, end).map_err(LoopError::Source)? {
                AfterEnd::Reset => self.machine.reset()?,
                AfterEnd::Finish => return Ok(Turn::Finished(end)),
                AfterEnd::FinishWithDigest => {
                    self.take_digest()?;
                    return Ok(Turn::Finished(end));
                }
            },
        }
        Ok(Turn::Again)
    }

    fn take_digest(&mut self) -> Result<(), LoopError<S::Error>> {
        let digest = self.machine.digest()?;
        self.source.digest(self.machine.position(), digest).map_err(LoopError::Source)
    }

    /// Reports to the source what left the machine.
    fn report_to_source(&mut self) -> Result<(), LoopError<S::Error>> {
        let at = self.machine.position();
        let exits = self.machine.take_exit_checks();
        if !exits.is_empty() {
            self.source.exits(at, &exits).map_err(LoopError::Source)?;
        }
        for request in self.machine.take_disk_requests() {
            self.source.disk(at, request).map_err(LoopError::Source)?;
        }
        for output in self.machine.take_outputs() {
            self.source.output(at, output).map_err(LoopError::Source)?;
        }
        Ok(())
    }
}
