//! Block device (section 5.2). A request leaves the machine; its completion comes back as an input. Only then does the data
//! of a read enter guest memory.

use std::collections::VecDeque;
use std::sync::Arc;

use entry::{DiskRequest, DiskResult, DiskWork};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::io::DeviceIo;
use super::queue::{Broken, Buffer, Chain, gather, scatter, total};

pub(super) const QUEUES: [u16; 1] = [128];
const SECTOR: u64 = 512;
/// VIRTIO_BLK_F_SEG_MAX, _RO, _BLK_SIZE, _FLUSH.
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
/// Number of data buffers in a request: as many as the queue has descriptors, without header and status.
const SEGMENTS_MAX: u32 = QUEUES[0] as u32 - 2;
/// The most data in one request, bytes; more is an error. Linux uses at most 1.25 MiB.
const REQUEST_MAX: u64 = 4 << 20;
/// While the requests in flight have at least this much data, bytes, further ones wait in the queue.
const IN_FLIGHT_MAX: u64 = 8 << 20;
/// The serial number.
const ID: &[u8; 20] = b"vmft\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Request types.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
}

/// Values of the status byte.
mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum BlkWork {
    Read {
        offset: u64,
        len: u32,
    },
    /// The data as it was when the guest made the request.
    Write {
        offset: u64,
        data: Arc<[u8]>,
    },
    Flush,
}

impl BlkWork {
    /// Number of bytes of data.
    fn bytes(&self) -> u64 {
        match self {
            BlkWork::Read { len, .. } => *len as u64,
            BlkWork::Write { data, .. } => data.len() as u64,
            BlkWork::Flush => 0,
        }
    }
}

/// A request that is not completed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PendingRequest {
    id: u64,
    head: u16,
    /// Buffers for the data and, in the last byte, the status.
    writable: Vec<Buffer>,
    work: BlkWork,
}

/// The device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Blk {
    sectors: u64,
    read_only: bool,
    next_id: u64,
    pending: VecDeque<PendingRequest>,
}

impl Blk {
    pub fn new(bytes: u64, read_only: bool) -> Blk {
        Blk { sectors: bytes / SECTOR, read_only, next_id: 0, pending: VecDeque::new() }
    }

    pub fn features(&self) -> u64 {
        SEG_MAX | BLK_SIZE | FLUSH | if self.read_only { READ_ONLY } else { 0 }
    }

    /// The configuration space: struct virtio_blk_config up to blk_size.
    pub fn config(&self) -> Vec<u8> {
        let mut config = self.sectors.to_le_bytes().to_vec();
        config.extend([0; 4]);
        config.extend(SEGMENTS_MAX.to_le_bytes());
        config.extend([0; 4]);
        config.extend((SECTOR as u32).to_le_bytes());
        config
    }

    /// Resets the device. Completions of the requests in flight will be ignored.
    pub fn reset(&mut self) {
        self.pending.clear();
    }

    pub fn notify(&mut self, io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        loop {
            loop {
                let in_flight: u64 = self.pending.iter().map(|pending| pending.work.bytes()).sum();
                if in_flight >= IN_FLIGHT_MAX {
                    return Ok(());
                }
                let Some(chain) = io.next_chain(0)? else { break };
                self.start_request(chain, io)?;
            }
            if !io.queues[0].ask_for_notification(io.memory)? {
                return Ok(());
            }
        }
    }

    fn start_request(&mut self, chain: Chain, io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        let room = total(&chain.writable);
        let mut header = Vec::with_capacity(16);
        gather(io.memory, &chain.readable, 0, 16, &mut header)?;
        let Ok(header) = <[u8; 16]>::try_from(header) else { return Err(Broken) };
        if room == 0 {
            // There is not even room for a status.
            return Err(Broken);
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let work = match self.check_request(kind, u64::from_le_bytes(sector), &chain, io)? {
            Ok(work) => work,
            Err((code, written)) => return finish(io, chain.head, &chain.writable, written, code),
        };
        let request = DiskRequest { slot: io.slot, id: self.next_id, work: disk_work(&work) };
        io.effects.disk.push(request);
        self.pending.push_back(PendingRequest {
            id: self.next_id,
            head: chain.head,
            writable: chain.writable,
            work,
        });
        self.next_id += 1;
        Ok(())
    }

    /// What a request needs from the outside; or, if it ends here, its status and the number of bytes written.
    fn check_request(
        &self,
        kind: u32,
        sector: u64,
        chain: &Chain,
        io: &DeviceIo<'_>,
    ) -> Result<Result<BlkWork, (u8, u32)>, Broken> {
        let (outward, inward) = (total(&chain.readable) - 16, total(&chain.writable) - 1);
        let inside = |len: u64| {
            let end = sector.checked_add(len / SECTOR);
            len.is_multiple_of(SECTOR)
                && len > 0
                && len <= REQUEST_MAX
                && end.is_some_and(|end| end <= self.sectors)
        };
        Ok(match kind {
            kind::IN if inside(inward) => Ok(BlkWork::Read { offset: sector * SECTOR, len: inward as u32 }),
            kind::OUT if inside(outward) && !self.read_only => {
                let mut data = Vec::with_capacity(outward as usize);
                gather(io.memory, &chain.readable, 16, outward as usize, &mut data)?;
                Ok(BlkWork::Write { offset: sector * SECTOR, data: data.into() })
            }
            kind::FLUSH => Ok(BlkWork::Flush),
            kind::GET_ID if inward >= ID.len() as u64 => {
                Err((status::OK, scatter(io.memory, &chain.writable, ID)?))
            }
            kind::IN | kind::OUT | kind::GET_ID => Err((status::IOERR, 0)),
            _ => Err((status::UNSUPP, 0)),
        })
    }

    /// Completes a request that the outside has done. A request from before a reset is ignored.
    pub fn complete(&mut self, id: u64, result: DiskResult, io: &mut DeviceIo<'_>) -> Result<(), Broken> {
        let Some(at) = self.pending.iter().position(|pending| pending.id == id) else { return Ok(()) };
        let Some(pending) = self.pending.remove(at) else { return Ok(()) };
        let (written, code) = match (&pending.work, result) {
            (BlkWork::Read { len, .. }, DiskResult::Read(data)) if data.len() == *len as usize => {
                (scatter(io.memory, &pending.writable, &data)?, status::OK)
            }
            (BlkWork::Write { .. } | BlkWork::Flush, DiskResult::Done) => (0, status::OK),
            _ => (0, status::IOERR),
        };
        finish(io, pending.head, &pending.writable, written, code)?;
        // There may be room now for a request that waits.
        self.notify(io)
    }

    pub fn unfinished(&self, slot: u8) -> Vec<DiskRequest> {
        let request =
            |pending: &PendingRequest| DiskRequest { slot, id: pending.id, work: disk_work(&pending.work) };
        self.pending.iter().map(request).collect()
    }
}

fn disk_work(work: &BlkWork) -> DiskWork {
    match work {
        BlkWork::Read { offset, len } => DiskWork::Read { offset: *offset, len: *len },
        BlkWork::Write { offset, data } => DiskWork::Write { offset: *offset, data: data.clone() },
        BlkWork::Flush => DiskWork::Flush,
    }
}

/// Writes the status into the last writable byte and gives the chain back.
fn finish(
    io: &mut DeviceIo<'_>,
    head: u16,
    writable: &[Buffer],
    written: u32,
    code: u8,
) -> Result<(), Broken> {
    let last = writable.iter().rfind(|buffer| buffer.len > 0).ok_or(Broken)?;
    io.memory.write_obj(code, GuestAddress(last.addr + last.len as u64 - 1))?;
    io.return_chain(0, head, written + 1)
}
