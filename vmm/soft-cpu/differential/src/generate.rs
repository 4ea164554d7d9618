//! Generates a case from a seed.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, Register};

use crate::case::{Built, Case, Item, Placement, Pointer};
use crate::catalogue::{CatalogueEntry, RegisterFile};
use crate::draft::{Draft, location};
use crate::flow::{Reject, undefined_flags};
use crate::layout::{self, CODE_LEN, LOW, PAGE};
use crate::operands;
use crate::rng::CaseRng;
use crate::state::{CaseStart, Fx, PLANTED_MAX};
use crate::values;

/// Maximum number of instructions of a case, not counting those that define flags.
const ITEMS_MAX: u64 = 8;
/// Maximum number of draws for a seed; reached only if the generator has an error.
const ATTEMPTS: u64 = 1000;

/// Generates the case of `seed`. Calls `rejected` for each draw that could not be used.
pub fn generate(seed: u64, entries: &[CatalogueEntry], mut rejected: impl FnMut(Reject)) -> (Case, Built) {
    for attempt in 0..ATTEMPTS {
        let mut rng = CaseRng::new(seed ^ attempt.wrapping_mul(0xd1b5_4a32_d192_ed03));
        let case = draw(seed, &mut rng, entries, attempt > 0);
        match case.build() {
            Ok(built) => return (case, built),
            Err(why) => rejected(why),
        }
    }
    panic!("{ATTEMPTS} draws for seed {seed:#x} gave no case that can be compared");
}

fn draw(seed: u64, rng: &mut CaseRng, entries: &[CatalogueEntry], define_flags: bool) -> Case {
    let theme = match rng.below(100) {
        0..30 => None,
        30..55 => Some(RegisterFile::Integer),
        55..72 => Some(RegisterFile::X87),
        72..80 => Some(RegisterFile::Mmx),
        _ => Some(RegisterFile::Sse),
    };
    let mut choice: Vec<&CatalogueEntry> =
        entries.iter().filter(|e| theme.is_none_or(|t| t == e.class)).collect();
    if choice.is_empty() {
        choice.extend(entries);
    }
    let (start, values) = draw_start(rng);
    let favourites = (0..3).map(|_| rng.below(16) as u32).collect();
    let mut draft = Draft { rng, start, pointers: Vec::new(), values, favourites };
    let count = 1 + draft.rng.below(ITEMS_MAX);
    let mut items = Vec::new();
    while (items.len() as u64) < count {
        let entry = draft.rng.pick(&choice);
        let Some(item) = draft.item(entry.code, items.len()) else { continue };
        let undefined = undefined_flags(&item.ins) != 0;
        items.push(item);
        if undefined && (define_flags || draft.rng.chance(50)) {
            items.push(draft.compare());
        }
    }
    // Targets are drawn before the number of items is known.
    let end = items.len();
    items.iter_mut().for_each(|i| i.target = i.target.map(|t| t.min(end)));
    let placement = match draft.rng.below(100) {
        0..65 => Placement::At(draft.rng.below(CODE_LEN / 2 - 256)),
        65..85 => Placement::Across(draft.rng.below(64)),
        _ => Placement::Before(draft.rng.pick(&[0, 0, 1, -1, -2, -3, 8])),
    };
    let Draft { start, pointers, .. } = draft;
    Case { seed, items: items.into_iter().enumerate().collect(), pointers, placement, start }
}

fn draw_start(rng: &mut CaseRng) -> (CaseStart, Vec<usize>) {
    let mut gpr = [0; 16];
    let mut no_pointers = Vec::new();
    for (r, v) in gpr.iter_mut().enumerate() {
        *v = match r {
            4 if rng.chance(85) => LOW + PAGE + 0x400 + 8 * rng.below(32),
            4 => location(rng, 8, true),
            1 if rng.chance(60) => rng.below(10),
            3 | 5..=7 | 12..=15 if rng.chance(80) => location(rng, 16, true),
            _ => {
                no_pointers.push(r);
                if rng.chance(30) { rng.below(40).wrapping_sub(8) } else { values::int(rng, 64) }
            }
        };
    }
    let mut rflags = 0x202 | values::int(rng, 12) & 0x8d5;
    if rng.chance(15) {
        rflags |= 0x400;
    }
    // TF, or AC, which makes unaligned accesses fault.
    if rng.chance(1) {
        rflags |= rng.pick(&[0x100, 0x4_0000]);
    }
    let fx = draw_fx(rng);
    (CaseStart { gpr, rflags, fx, rip: 0, code: Vec::new(), planted: Vec::new() }, no_pointers)
}

fn draw_fx(rng: &mut CaseRng) -> Fx {
    let masks: u16 = if rng.chance(75) { 0x3f } else { rng.below(64) as u16 };
    let fcw = 0x40 | masks | rng.pick(&[0u16, 0x200, 0x300, 0x300]) | (rng.below(4) << 10) as u16;
    let flags = if rng.chance(25) { (rng.bits() & rng.bits()) as u16 & 0x7f } else { 0 };
    let mut fsw = flags | rng.bits() as u16 & 0x7f00;
    // ES and B are set if and only if an unmasked exception is pending.
    if flags & !masks & 0x3f != 0 {
        if rng.chance(50) {
            fsw |= 0x8080;
        } else {
            fsw &= !0x7f;
        }
    }
    let masks: u32 = if rng.chance(75) { 0x1f80 } else { (rng.below(64) as u32) << 7 };
    let mut mxcsr = masks | (rng.below(4) as u32) << 13;
    if rng.chance(20) {
        mxcsr |= rng.pick(&[0x40, 0x8000, 0x8040]);
    }
    if rng.chance(25) {
        mxcsr |= rng.below(64) as u32;
    }
    let in_use = match rng.below(4) {
        0 => 0xff,
        1 => rng.bits() as u8,
        2 => 0,
        _ => !(1 << rng.below(8)),
    };
    Fx {
        fcw,
        fsw,
        in_use,
        mxcsr,
        st: std::array::from_fn(|_| {
            let (significand, sign_exponent) = values::extended(rng);
            if rng.chance(15) { (values::int(rng, 64), 0xffff) } else { (significand, sign_exponent) }
        }),
        xmm: std::array::from_fn(|_| values::vector(rng)),
    }
}

impl Draft<'_> {
    /// An instruction with this encoding, or `None` if its operands cannot be drawn (perhaps only this time).
    fn item(&mut self, code: Code, number: usize) -> Option<Item> {
        let mut ins = Instruction::default();
        ins.set_code(code);
        for (n, kind) in code.op_code().op_kinds().iter().enumerate() {
            operands::draw(self, &mut ins, n as u32, *kind)?;
        }
        let target = self.branch(&ins, code, number);
        self.prefixes(&mut ins);
        if matches!(ins.mnemonic(), Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b) {
            self.make_equal(&ins);
        }
        let mut prefixes = Vec::new();
        if self.rng.chance(4) {
            let rex = 0x40 + self.rng.below(16) as u8;
            prefixes.push(
                self.rng.pick(&[0x66, 0xf2, 0xf3, 0x67, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0xf0, rex, rex]),
            );
        }
        let mutation = self
            .rng
            .chance(1)
            .then(|| (self.rng.below(15) as u8, self.rng.pick(&[1, 2, 4, 8, 16, 32, 64, 128])));
        Some(Item { prefixes, ins, target, mutation })
    }

    /// The target of a near branch; for indirect ones the register or memory that holds it.
    fn branch(&mut self, ins: &Instruction, code: Code, number: usize) -> Option<usize> {
        let later = number + 1 + self.rng.below(3) as usize;
        let sane = self.rng.chance(75);
        match code {
            Code::Retnq | Code::Retnq_imm16 if sane => {
                let rsp = self.start.gpr[4];
                self.add_pointer(Pointer::Memory(rsp), later);
            }
            Code::Jmp_rm64 | Code::Call_rm64 if sane => {
                if ins.op0_register() != Register::None {
                    self.add_pointer(Pointer::Register(ins.op0_register().number()), later);
                } else if let Some(at) = self.operand_address(ins) {
                    self.add_pointer(Pointer::Memory(at), later);
                }
            }
            _ => {}
        }
        let near = matches!(code.op_code().op0_kind(), OpCodeOperandKind::br64_1 | OpCodeOperandKind::br64_4);
        near.then_some(later)
    }

    /// Adds a pointer to item `target`.
    fn add_pointer(&mut self, pointer: Pointer, target: usize) {
        let fits = match pointer {
            Pointer::Register(_) => true,
            Pointer::Memory(at) => {
                layout::plantable(at, 8) && self.start.planted.len() + self.pointers.len() < PLANTED_MAX
            }
        };
        if fits {
            self.pointers.push((pointer, target));
        }
    }

    /// The linear address of the memory operand if the instruction were executed first.
    fn operand_address(&self, ins: &Instruction) -> Option<u64> {
        ins.virtual_address(0, 0, |register, _, _| match register {
            Register::FS => Some(layout::FS_BASE),
            Register::GS => Some(layout::GS_BASE),
            Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
            r if r.is_gpr64() => Some(self.start.gpr[r.number()]),
            r if r.is_gpr32() => Some(self.start.gpr[r.number()] as u32 as u64),
            _ => None,
        })
    }

    /// Plants the value that CMPXCHG compares with as its memory operand.
    fn make_equal(&mut self, ins: &Instruction) {
        if self.rng.chance(50)
            && let Some(at) = self.operand_address(ins)
        {
            let [rax, _, rdx, ..] = self.start.gpr;
            let (value, len) = match ins.mnemonic() {
                Mnemonic::Cmpxchg8b => (rax as u32 as u128 | (rdx as u32 as u128) << 32, 8),
                Mnemonic::Cmpxchg16b => (rax as u128 | (rdx as u128) << 64, 16),
                _ => (rax as u128, 8),
            };
            self.plant(at, len, value.to_le_bytes());
        }
    }

    fn prefixes(&mut self, ins: &mut Instruction) {
        let op = ins.op_code();
        if op.can_use_lock_prefix() && self.rng.chance(25) {
            ins.set_has_lock_prefix(true);
        }
        let (rep, repne) = (op.can_use_rep_prefix(), op.can_use_repne_prefix());
        match self.rng.below(10) {
            0..4 if rep => ins.set_has_rep_prefix(true),
            4..7 if repne => ins.set_has_repne_prefix(true),
            _ => {}
        }
    }

    /// CMP of two registers: gives all status flags a defined value.
    fn compare(&mut self) -> Item {
        let mut ins = Instruction::default();
        ins.set_code(Code::Cmp_r64_rm64);
        for n in 0..2 {
            let r = self.rng.pick(&self.values);
            ins.set_op_register(n, Register::RAX + r as u32);
        }
        Item { prefixes: Vec::new(), ins, target: None, mutation: None }
    }
}
