//! The one loop that runs a guest, whatever its inputs come from.

use entry::{End, Position};

use crate::machine::{Machine, MachineError, Stop};
use crate::source::{After, Next, Source};

/// What a turn of the loop came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do.
    Again,
    /// The source asked for a pause.
    Paused,
    /// The guest's run is over.
    Finished(End),
}

/// The loop cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LoopError<E: std::error::Error> {
    /// The machine or its engine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The source.
    #[error(transparent)]
    Source(E),
}

/// A machine and the source of its inputs. Going live is to put another source around the same machine.
pub struct GuestLoop<S> {
    /// The machine.
    pub machine: Machine,
    /// Its source.
    pub source: S,
}

impl<S: Source> GuestLoop<S> {
    /// Runs until the source pauses or the guest ends.
    pub fn run(&mut self) -> Result<Turn, LoopError<S::Error>> {
        loop {
            match self.turn()? {
                Turn::Again => {}
                turn => return Ok(turn),
            }
        }
    }

    /// Does the next thing that the source says.
    pub fn turn(&mut self) -> Result<Turn, LoopError<S::Error>> {
        // A source that had no answer has left the machine in the middle of an instruction.
        if let Some(stop) = self.machine.finish()? {
            return self.stopped(stop);
        }
        // One that was paused between two positions goes on to the next before anything else.
        if self.machine.is_between() {
            return self.run_to(Some(Position::exact(self.machine.position().count + 1)));
        }
        match self.source.next(&self.machine).map_err(LoopError::Source)? {
            Next::Apply(input) => self.machine.apply(input),
            Next::Run { until } => return self.run_to(until),
            Next::Digest => self.digest()?,
            Next::Pause => return Ok(Turn::Paused),
        }
        self.tell()?;
        Ok(Turn::Again)
    }

    fn run_to(&mut self, until: Option<Position>) -> Result<Turn, LoopError<S::Error>> {
        loop {
            match self.machine.run(until)? {
                Stop::Between => {
                    self.tell()?;
                    if !self.source.between(self.machine.position()).map_err(LoopError::Source)? {
                        return Ok(Turn::Paused);
                    }
                }
                stop => return self.stopped(stop),
            }
        }
    }

    fn stopped(&mut self, stop: Stop) -> Result<Turn, LoopError<S::Error>> {
        // What came before the stop is told before it.
        self.tell()?;
        let at = self.machine.position();
        match stop {
            Stop::Reached | Stop::Kicked | Stop::Between | Stop::Halted | Stop::Outputs => {}
            Stop::Question(mut question) => loop {
                let Some(answer) = self.source.answer(at, &question).map_err(LoopError::Source)? else {
                    return Ok(Turn::Paused);
                };
                self.machine.answer(answer)?;
                // At one position may be several, and the source sees a whole boundary only.
                match self.machine.finish()? {
                    Some(Stop::Question(next)) => question = next,
                    Some(stop) => return self.stopped(stop),
                    None => break self.tell()?,
                }
            },
            Stop::End(end) => match self.source.ended(at, end).map_err(LoopError::Source)? {
                After::Reset => self.machine.reset()?,
                After::Finish => return Ok(Turn::Finished(end)),
                After::FinishWithDigest => {
                    self.digest()?;
                    return Ok(Turn::Finished(end));
                }
            },
        }
        Ok(Turn::Again)
    }

    fn digest(&mut self) -> Result<(), LoopError<S::Error>> {
        let digest = self.machine.digest()?;
        self.source.digest(self.machine.position(), digest).map_err(LoopError::Source)
    }

    /// Tells the source what left the machine.
    fn tell(&mut self) -> Result<(), LoopError<S::Error>> {
        let at = self.machine.position();
        let exits = self.machine.take_exits();
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
