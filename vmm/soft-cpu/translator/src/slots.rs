//! Where blocks and jump targets find each other's code: a slot for each block, and a cache of jump targets.

use std::collections::HashMap;

/// Blocks known before everything is dropped.
pub(crate) const SLOTS: usize = 1 << 16;
/// Entries of the jump cache of each mode (supervisor and user).
pub(crate) const JUMPS: usize = 4096;

/// A block's index in the table of code addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CodeSlot(pub(crate) u32);

/// Slots of the stubs, which every block needs.
pub(crate) mod fixed {
    use super::CodeSlot;
    /// Leaves to the run loop, at the address in [`soft_cpu::state::RIP_BASE`].
    pub(crate) const LEAVE: CodeSlot = CodeSlot(0);
    /// Leaves to the run loop, at RIP.
    pub(crate) const LEAVE_AT_RIP: CodeSlot = CodeSlot(1);
    /// Calls a handler.
    pub(crate) const PERFORM: CodeSlot = CodeSlot(2);
    /// The first slot of a block.
    pub(super) const FIRST: usize = 3;
}

/// The table of code addresses, which translated code reads, and which block has which slot.
pub(crate) struct SlotTable {
    codes: Box<[u64]>,
    used: usize,
    by_start: HashMap<usize, CodeSlot>,
    by_page: HashMap<usize, Vec<CodeSlot>>,
}

impl SlotTable {
    /// A table without blocks; the arguments are the addresses of the stubs (see [`fixed`]).
    pub(crate) fn new(leave: u64, leave_at_rip: u64, perform: u64) -> SlotTable {
        let mut codes = vec![leave; SLOTS].into_boxed_slice();
        codes[fixed::LEAVE_AT_RIP.0 as usize] = leave_at_rip;
        codes[fixed::PERFORM.0 as usize] = perform;
        SlotTable { codes, used: fixed::FIRST, by_start: HashMap::new(), by_page: HashMap::new() }
    }

    /// The slot of the block at RAM offset `start`, which need not be translated yet.
    pub(crate) fn slot(&mut self, start: usize) -> CodeSlot {
        *self.by_start.entry(start).or_insert_with(|| {
            self.used += 1;
            let slot = CodeSlot(self.used as u32 - 1);
            self.by_page.entry(start / 4096).or_default().push(slot);
            slot
        })
    }

    /// Is there room for `count` more?
    pub(crate) fn has_room(&self, count: usize) -> bool {
        self.used + count <= SLOTS
    }

    /// The block of `slot` now has code.
    pub(crate) fn set_code(&mut self, slot: CodeSlot, code: u64) {
        self.codes[slot.0 as usize] = code;
    }

    /// The word with the address of the code of the block at `start`, if it has code.
    pub(crate) fn translated(&self, start: usize) -> Option<&u64> {
        let slot = self.by_start.get(&start)?;
        let code = &self.codes[slot.0 as usize];
        self.is_block(*code).then_some(code)
    }

    /// The address of the code that `jump` leads to, if it still has code.
    pub(crate) fn code_of(&self, jump: &Jump) -> Option<u64> {
        let index = (jump.slot as usize - self.codes.as_ptr() as usize) / size_of::<u64>();
        let code = self.codes[index];
        self.is_block(code).then_some(code)
    }

    fn is_block(&self, code: u64) -> bool {
        code != self.codes[fixed::LEAVE.0 as usize]
    }

    /// The blocks of a page of RAM have no code any more.
    pub(crate) fn invalidate(&mut self, page: usize) {
        for slot in self.by_page.get(&page).into_iter().flatten() {
            self.codes[slot.0 as usize] = self.codes[fixed::LEAVE.0 as usize];
        }
    }

    /// Forgets all blocks.
    pub(crate) fn clear(&mut self) {
        let leave = self.codes[fixed::LEAVE.0 as usize];
        self.codes[fixed::FIRST..].fill(leave);
        self.used = fixed::FIRST;
        self.by_start.clear();
        self.by_page.clear();
    }

    /// The table, for translated code.
    pub(crate) fn as_ptr(&self) -> *const u64 {
        self.codes.as_ptr()
    }
}

/// A cached jump target: valid as long as the instruction TLB has this frame for its page.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Jump {
    pub(crate) rip: u64,
    pub(crate) frame: u64,
    /// The word of [`SlotTable`] with the address of its block's code.
    pub(crate) slot: *const u64,
}

/// Not canonical, so that no jump has it as its target.
const NO_RIP: u64 = 1 << 63;
pub(crate) const NO_JUMP: Jump = Jump { rip: NO_RIP, frame: 0, slot: std::ptr::null() };

/// The index of `rip` in the jump cache; [`crate::assembler::BlockAssembler::look_up`] computes the same in
/// translated code.
pub(crate) fn jump_index(rip: u64) -> usize {
    (rip ^ rip >> 11) as usize % JUMPS
}
