//! virtio-rng (virtio 1.2, section 5.4): one word at a time.
#![allow(unsafe_code)]

use super::mmio::Mmio;
use super::queue::{Queue, WRITE};
use crate::cpu;
use crate::ram::Free;
use bare::options::Device as Location;

const DEVICE_ID: u32 = 4;

/// An entropy device.
pub struct Rng {
    mmio: Mmio,
    queue: Queue,
    word: *mut u64,
}

impl Rng {
    /// The first entropy device among `devices`, started.
    pub fn find(devices: &[Option<Location>], free: &mut Free) -> Option<Self> {
        let mmio = Mmio::find(devices, DEVICE_ID)?;
        mmio.negotiate(0, 0);
        let mut queue = Queue::new(mmio, 0, 1, free);
        let word = free.take_words(1).as_mut_ptr();
        queue.describe(0, word as u64, 8, WRITE, 0);
        mmio.start();
        Some(Self { mmio, queue, word })
    }

    /// A random word; sleeps until the device has given it.
    ///
    /// # Panics
    /// If the device gives less than a word.
    pub fn word(&mut self) -> u64 {
        self.queue.offer(0);
        self.queue.publish();
        loop {
            cpu::wait(self.mmio.irq);
            self.mmio.acknowledge();
            if let Some((_, len)) = self.queue.take() {
                assert_eq!(len, 8, "virtio-rng gave {len} bytes of 8");
                // SAFETY: the device has given the buffer back.
                return unsafe { self.word.read_volatile() };
            }
        }
    }
}
