//! Console device (section 5.3) with one port and without optional features.

use entry::{Console, Output};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::io::DeviceIo;
use super::queue::{Broken, gather, scatter, total};

/// Queue sizes: receive (to the guest), transmit (from the guest).
pub(super) const QUEUES: [u16; 2] = [64, 64];
pub(super) const RX: usize = 0;
const TX: usize = 1;
/// The most bytes that leave as one output.
const OUTPUT_MAX: usize = 4096;
/// The most bytes that are printed from one chain; more are lost.
const CHAIN_MAX: u64 = 1 << 20;

/// The device. It has no state other than its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VirtioConsole;

impl VirtioConsole {
    pub fn notify(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        if queue != TX {
            return Ok(());
        }
        loop {
            while let Some(chain) = io.next_chain(TX)? {
                let len = total(&chain.readable).min(CHAIN_MAX);
                for start in (0..len).step_by(OUTPUT_MAX) {
                    let mut bytes = Vec::new();
                    gather(io.memory, &chain.readable, start, OUTPUT_MAX, &mut bytes)?;
                    let console = Console::Virtio(io.slot);
                    io.effects.outputs.push(Output::Console { console, bytes });
                }
                io.return_chain(TX, chain.head, 0)?;
            }
            if !io.queues[TX].ask_for_notification(io.memory)? {
                return Ok(());
            }
        }
    }

    /// Passes typed bytes to the guest. Those without a buffer are lost.
    pub fn receive(&mut self, bytes: &[u8], io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        let mut rest = bytes;
        while !rest.is_empty() && io.queues[RX].ready() {
            let Some(chain) = io.next_chain(RX)? else { break };
            let written = scatter(io.memory, &chain.writable, rest)?;
            rest = &rest[written as usize..];
            io.return_chain(RX, chain.head, written)?;
        }
        Ok(())
    }
}
