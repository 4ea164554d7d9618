//! Network device (section 5.1): one pair of queues, frames without offloads.

use entry::Output;
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::io::DeviceIo;
use super::queue::{Broken, gather, scatter, total};

/// Queue sizes: receive, transmit.
pub(super) const QUEUES: [u16; 2] = [256, 256];
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
/// VIRTIO_NET_F_MAC and VIRTIO_NET_F_STATUS.
pub(super) const FEATURES: u64 = 1 << 5 | 1 << 16;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// struct virtio_net_hdr of version 1.
const HEADER: usize = 12;
/// Largest frame: Ethernet header, VLAN tag, 1500 bytes.
const FRAME_MAX: usize = 1518;
/// Smallest frame: the Ethernet header.
const FRAME_MIN: usize = 14;

/// The device. It has no changing state other than its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Net {
    mac: [u8; 6],
}

impl Net {
    pub fn new(mac: [u8; 6]) -> Net {
        Net { mac }
    }

    pub fn config(&self) -> Vec<u8> {
        [&self.mac[..], &LINK_UP.to_le_bytes()].concat()
    }

    pub fn notify(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        if queue != TX {
            return Ok(());
        }
        loop {
            while let Some(chain) = io.next_chain(TX)? {
                let len = total(&chain.readable);
                // A frame whose size is not possible on a network is dropped, as a network card would do.
                if (HEADER + FRAME_MIN..=HEADER + FRAME_MAX).contains(&(len as usize)) {
                    let mut bytes = Vec::with_capacity(FRAME_MAX);
                    gather(io.memory, &chain.readable, HEADER as u64, FRAME_MAX, &mut bytes)?;
                    io.effects.outputs.push(Output::Frame { slot: io.slot, bytes });
                }
                io.return_chain(TX, chain.head, 0)?;
            }
            if !io.queues[TX].ask_for_notification(io.memory)? {
                return Ok(());
            }
        }
    }

    /// Passes a frame to the guest. It is dropped if there is no buffer, or if the buffer is too small.
    pub fn receive(&mut self, frame: &[u8], io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        if frame.len() > FRAME_MAX || !io.queues[RX].ready() {
            return Ok(());
        }
        let Some(chain) = io.next_chain(RX)? else { return Ok(()) };
        let mut bytes = [0; HEADER + FRAME_MAX];
        // num_buffers is 1, everything else of the header 0.
        bytes[10] = 1;
        let end = HEADER + frame.len();
        bytes[HEADER..end].copy_from_slice(frame);
        let fits = total(&chain.writable) >= end as u64;
        let written = if fits { scatter(io.memory, &chain.writable, &bytes[..end])? } else { 0 };
        io.return_chain(RX, chain.head, written)
    }
}
