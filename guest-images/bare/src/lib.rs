//! vmft's bare-metal test guest: what it says and understands.
//!
//! The guest boots as a Linux kernel does (64-bit boot protocol) in well under a millisecond of guest work, runs all
//! of its Rust in ring 3, and does what its command line says:
//!
//! | word | meaning |
//! |---|---|
//! | `ip=10.0.0.2::10.0.0.1:255.255.255.0::eth0:off` | address, gateway and netmask, in Linux's syntax |
//! | `virtio_mmio.device=512@0xd0000000:5` | size, base and interrupt line of a virtio-mmio device; up to 8 |
//! | `workload=serve` | the default: the services below; prints `READY` once they listen |
//! | `workload=hello` | prints a line and powers off |
//! | `workload=spin` | integer loop with conditional branches, prints its registers every `every=` rounds (16777216) |
//! | `workload=mem` | rewrites `mib=` MiB (16) with a pseudo-random pattern, prints a checksum for each pass |
//! | `workload=disk` | writes up to `mib=` MiB (16) of the first virtio-blk device with the sequence of `seed + pass`, flushes, reads back, prints a checksum for each pass; a wrong word is a panic |
//! | `workload=random` | prints words of the first virtio-rng device |
//! | `workload=panic` | prints a message and triple-faults |
//! | `count=` | rounds of `spin`, passes of `mem` or `disk`, words of `random`, then power-off; without it they go on for ever |
//! | `seed=` | start of the pseudo-random sequences (1); of TCP's too, together with a word of the virtio-rng device if there is one |
//! | `hz=` | rate of the timer interrupt, 19 to 1000 (100) |
//!
//! Every other word is ignored, as Linux does. `mem` and `spin` are defined in [`pattern`].
//!
//! The guest answers ARP and ping, and serves TCP (what it sends ends when the client has ended its own side):
//!
//! | port | connections | service |
//! |---|---|---|
//! | 7777 | 64 | the counter of [`counter`]; the same lines are understood on the console |
//! | 7778 | 4 | echo |
//! | 7779 | 4 | sink: at the client's end, one line `BYTES CHECKSUM MS` with [`pattern::Checksum`] in hexadecimal |
//! | 7780 | 4 | source: for each line with a number, that many bytes of [`pattern::fill`], from its start |
//! | 7781 | 4 | work: for each line `spin ROUNDS` or `mem PASSES`, so much of that workload (`mem` on 1 MiB) with seed 1, then `NAME SIZE RESULT` |
#![cfg_attr(not(test), no_std)]

pub mod boot_params;
pub mod counter;
pub mod options;
pub mod pattern;
