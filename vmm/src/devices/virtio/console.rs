//! Console device (section 5.3) with one port and nothing optional.

use entry::{Console, Output};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::Io;
use super::queue::{Broken, gather, scatter, total};

/// Queue sizes: to the guest, from the guest.
pub(super) const QUEUES: [u16; 2] = [64, 64];
pub(super) const RX: usize = 0;
const TX: usize = 1;
/// Bytes that leave as one output.
const OUTPUT_MAX: usize = 4096;
/// Bytes printed by one chain; what is beyond is lost.
const CHAIN_MAX: u64 = 1 << 20;

/// The device. Its state is in its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VirtioConsole;

impl VirtioConsole {
    pub fn notify(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        if queue != TX {
            return Ok(());
        }
        loop {
            while let Some(chain) = io.pop(TX)? {
                let len = total(&chain.readable).min(CHAIN_MAX);
                for start in (0..len).step_by(OUTPUT_MAX) {
                    let mut bytes = Vec::new();
                    gather(io.memory, &chain.readable, start, OUTPUT_MAX, &mut bytes)?;
                    let console = Console::Virtio(io.slot);
                    io.effects.outputs.push(Output::Console { console, bytes });
                }
                io.put(TX, chain.head, 0)?;
            }
            if !io.queues[TX].ask_for_notification(io.memory)? {
                return Ok(());
            }
        }
    }

    /// Typed bytes; what finds no buffer is lost.
    pub fn receive(&mut self, bytes: &[u8], io: &mut Io<'_>) -> Result<(), Broken> {
        let mut rest = bytes;
        while !rest.is_empty() && io.queues[RX].ready() {
            let Some(chain) = io.pop(RX)? else { break };
            let written = scatter(io.memory, &chain.writable, rest)?;
            rest = &rest[written as usize..];
            io.put(RX, chain.head, written)?;
        }
        Ok(())
    }
}
