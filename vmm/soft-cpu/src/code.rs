//! Decoded code, cached by physical address.
//!
//! The cache is invisible to the guest. A block belongs to one page of RAM and lives until something writes
//! to decoded bytes of that page, by whatever linear address. Instructions that cross a page are looked up by
//! their bytes, because where their second half lies depends on the linear address.

use crate::decode::{BlockDecoder, Decoded, LENGTH_MAX};
use crate::insn::{Insn, PlaceInBlock};

/// Sets of the table of blocks.
const SETS: usize = 1 << 14;
/// Blocks in a set, which is a cache line. With one way some blocks of a busy guest would evict each other.
const WAYS: usize = 4;
/// Instructions (32 bytes each) kept before everything is dropped and decoded again; this bounds the memory.
const INSNS_MAX: usize = 1 << 17;
/// Most instructions in a block.
const BLOCK_MAX: usize = 32;
/// Entries of the cache of instructions that cross a page.
const CROSSING: usize = 256;

/// Consecutive instructions within one page, up to the first unconditional jump.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    /// RAM offset of its first byte.
    start: usize,
    /// Index of its first instruction in [`CodeCache::insns`].
    first: u32,
    /// Number of instructions.
    pub(crate) count: u16,
    /// Length in bytes.
    pub(crate) len: u16,
}

/// All decoded blocks.
pub(crate) struct CodeCache {
    table: Vec<[Block; WAYS]>,
    insns: Vec<Insn>,
    /// For each instruction that begins a block: how often the block has been run, up to `hot`; or [`NEVER`].
    heat: Vec<u8>,
    /// Number of runs after which a block is translated.
    hot: u8,
    /// Instructions that cross a page, with the bytes that they were decoded from.
    crossing: Vec<Option<([u8; LENGTH_MAX], Insn)>>,
}

/// Whether a block is to be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heat {
    /// It is to be interpreted.
    Cold,
    /// It is to be translated, if it is not yet.
    Hot,
}

/// In [`CodeCache::heat`]: the block is not to be translated.
const NEVER: u8 = u8::MAX;

const NOTHING: Block = Block { start: usize::MAX, first: 0, count: 0, len: 0 };

impl CodeCache {
    pub(crate) fn new() -> CodeCache {
        CodeCache {
            table: vec![[NOTHING; WAYS]; SETS],
            insns: Vec::new(),
            heat: Vec::new(),
            hot: NEVER,
            crossing: vec![None; CROSSING],
        }
    }

    /// The instructions of a block.
    #[inline(always)]
    pub(crate) fn insns(&self, b: &Block) -> &[Insn] {
        self.insns.get(b.first as usize..b.first as usize + b.count as usize).unwrap_or_default()
    }

    /// The block that starts at RAM offset `start`, if it is cached and valid.
    #[inline(always)]
    pub(crate) fn find(&self, start: usize) -> Option<Block> {
        self.table[set(start)].iter().find(|b| b.start == start).copied()
    }

    /// Decodes the block at RAM offset `start` and marks its bytes in its page's `chunks` (a bit for each 64
    /// bytes). `None` if its first instruction crosses the end of the page.
    pub(crate) fn decode(&mut self, ram: &[u8], start: usize, chunks: &mut u64) -> Option<Block> {
        if self.insns.len() > INSNS_MAX {
            self.clear();
        }
        let page_end = ((start | 4095) + 1).min(ram.len());
        let first = self.insns.len();
        let mut decoder = BlockDecoder::new(&ram[start..page_end]);
        let mut at = start;
        let mut heat = 0;
        while self.insns.len() - first < BLOCK_MAX {
            let Decoded::Insn(insn, place) = decoder.decode() else { break };
            if place == PlaceInBlock::Alone && at != start {
                break;
            }
            if place == PlaceInBlock::Alone {
                heat = NEVER;
            }
            self.insns.push(insn);
            at += (insn.len as usize).max(1);
            if place != PlaceInBlock::Middle {
                break;
            }
        }
        let count = self.insns.len() - first;
        if count == 0 {
            return None;
        }
        for chunk in start % 4096 / 64..=(at - 1 - start / 4096 * 4096).min(4095) / 64 {
            *chunks |= 1 << chunk;
        }
        let b = Block { start, first: first as u32, count: count as u16, len: (at - start) as u16 };
        self.heat.resize(self.insns.len(), 0);
        self.heat[first] = heat;
        let ways = &mut self.table[set(start)];
        ways.rotate_right(1);
        ways[0] = b;
        Some(b)
    }

    /// Drops the blocks of a page; `chunks` has a bit for each chunk with decoded code.
    pub(crate) fn invalidate(&mut self, page: usize, chunks: u64) {
        for chunk in (0..64).filter(|chunk| chunks >> chunk & 1 != 0) {
            let first = page * 4096 + chunk * 64;
            for start in first..first + 64 {
                for b in self.table[set(start)].iter_mut().filter(|b| b.start == start) {
                    *b = NOTHING;
                }
            }
        }
    }

    /// The first instruction of `bytes`, which starts at RAM offset `start` and crosses the end of the page.
    pub(crate) fn crossing(&mut self, start: usize, bytes: &[u8; LENGTH_MAX]) -> Insn {
        let kept = &mut self.crossing[start / 4096 % CROSSING];
        match kept {
            Some((of, insn)) if of == bytes => *insn,
            _ => {
                let Decoded::Insn(insn, _) = BlockDecoder::new(bytes).decode() else {
                    unreachable!("no instruction is longer than {LENGTH_MAX} bytes")
                };
                *kept = Some((*bytes, insn));
                insn
            }
        }
    }

    fn clear(&mut self) {
        self.table.fill([NOTHING; WAYS]);
        self.insns.clear();
        self.heat.clear();
    }

    /// Counts one more run of the block; returns whether it is to be translated.
    #[inline]
    pub(crate) fn warm(&mut self, b: &Block) -> Heat {
        match self.heat.get_mut(b.first as usize) {
            Some(heat) if *heat < self.hot => {
                *heat += 1;
                if *heat == self.hot { Heat::Hot } else { Heat::Cold }
            }
            Some(heat) if *heat != NEVER => Heat::Hot,
            _ => Heat::Cold,
        }
    }

    /// Sets after how many runs (at least one) blocks are to be translated.
    pub(crate) fn set_hot(&mut self, hot: u8) {
        self.hot = hot.clamp(1, NEVER - 1);
    }

    /// The block could not be translated, and is not to be tried again.
    pub(crate) fn never_translate(&mut self, b: &Block) {
        self.heat[b.first as usize] = NEVER;
    }
}

#[inline(always)]
fn set(start: usize) -> usize {
    (start ^ start >> 16) % SETS
}
