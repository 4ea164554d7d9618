//! Entropy device (section 5.4). Each chain becomes a question to the outside.

use entry::Question;
use serde::{Deserialize, Serialize};

use super::io::DeviceIo;
use super::queue::{Broken, Chain, scatter, total};

pub(super) const QUEUES: [u16; 1] = [16];
/// The most bytes that are asked for at once. A driver that wants more asks again.
const ANSWER_MAX: u64 = 4096;

/// The device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rng {
    /// The chain that waits for the answer.
    asking: Option<Chain>,
}

impl Rng {
    pub fn notify(&mut self, io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        if self.asking.is_some() {
            return Ok(());
        }
        loop {
            while let Some(chain) = io.next_chain(0)? {
                let len = total(&chain.writable).min(ANSWER_MAX) as u32;
                if len > 0 {
                    io.effects.question = Some(Question::Entropy { slot: io.slot, len });
                    self.asking = Some(chain);
                    return Ok(());
                }
                io.return_chain(0, chain.head, 0)?;
            }
            if !io.queues[0].ask_for_notification(io.memory)? {
                return Ok(());
            }
        }
    }

    pub fn answer(&mut self, bytes: &[u8], io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        let Some(chain) = self.asking.take() else { return Ok(()) };
        let written = scatter(io.memory, &chain.writable, bytes)?;
        io.return_chain(0, chain.head, written)?;
        self.notify(io)
    }
}
