//! Makes a case from a seed.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, Register};

use crate::case::{Built, Case, Item, Placement, Pointer};
use crate::catalogue::{Class, Entry};
use crate::flow::{Reject, undefined_flags};
use crate::layout::{self, BEHIND, CODE_LEN, HIGH, HOLE, LOW, PAGE, READ_ONLY};
use crate::operands;
use crate::rng::Rng;
use crate::state::{Fx, PLANTED_MAX, Planted, Start};
use crate::values;

/// Most instructions that a case has, without those that give flags a value.
const ITEMS_MAX: u64 = 8;
/// Draws before a seed is given up; never reached unless the generator is wrong.
const ATTEMPTS: u64 = 1000;

/// A case in the making.
pub(crate) struct Draft<'a> {
    pub(crate) rng: &'a mut Rng,
    pub(crate) start: Start,
    pub(crate) pointers: Vec<(Pointer, usize)>,
    /// General registers that hold no pointers into the data pages.
    pub(crate) values: Vec<usize>,
    /// XMM, MMX or x87 registers that this case prefers.
    pub(crate) favourites: Vec<u32>,
}

/// The case of `seed`, and what is wrong with those drawn before one was fit.
pub fn generate(seed: u64, entries: &[Entry], mut rejected: impl FnMut(Reject)) -> (Case, Built) {
    for attempt in 0..ATTEMPTS {
        let mut rng = Rng::new(seed ^ attempt.wrapping_mul(0xd1b5_4a32_d192_ed03));
        let case = draw(seed, &mut rng, entries, attempt > 0);
        match case.build() {
            Ok(built) => return (case, built),
            Err(why) => rejected(why),
        }
    }
    panic!("no case came out of seed {seed:#x} in {ATTEMPTS} draws");
}

fn draw(seed: u64, rng: &mut Rng, entries: &[Entry], define_flags: bool) -> Case {
    let theme = match rng.below(100) {
        0..30 => None,
        30..55 => Some(Class::Integer),
        55..72 => Some(Class::X87),
        72..80 => Some(Class::Mmx),
        _ => Some(Class::Sse),
    };
    let mut choice: Vec<&Entry> = entries.iter().filter(|e| theme.is_none_or(|t| t == e.class)).collect();
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
    // Targets are drawn before it is known how many items there are.
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

fn draw_start(rng: &mut Rng) -> (Start, Vec<usize>) {
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
    // TF, and AC, which has unaligned accesses fault.
    if rng.chance(1) {
        rflags |= rng.pick(&[0x100, 0x4_0000]);
    }
    let fx = draw_fx(rng);
    (Start { gpr, rflags, fx, rip: 0, code: Vec::new(), planted: Vec::new() }, no_pointers)
}

fn draw_fx(rng: &mut Rng) -> Fx {
    let masks: u16 = if rng.chance(75) { 0x3f } else { rng.below(64) as u16 };
    let fcw = 0x40 | masks | rng.pick(&[0u16, 0x200, 0x300, 0x300]) | (rng.below(4) << 10) as u16;
    let flags = if rng.chance(25) { (rng.bits() & rng.bits()) as u16 & 0x7f } else { 0 };
    let mut fsw = flags | rng.bits() as u16 & 0x7f00;
    // ES and B say that an exception is pending which is not masked.
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

/// A linear address for `size` bytes: mostly one that can be read and written. `far` allows what 32 bits and
/// RIP-relative operands cannot reach.
pub(crate) fn location(rng: &mut Rng, size: u64, far: bool) -> u64 {
    let size = size.clamp(1, 512);
    let part = 1 + rng.below(size);
    let align = size.next_power_of_two().min(16);
    let unaligned = rng.chance(20);
    match rng.below(200) {
        0..4 => READ_ONLY + rng.below(PAGE - size),
        4..12 => LOW + PAGE - part,
        12..14 => READ_ONLY - part,
        14..16 => HOLE - part,
        16..18 => HOLE + rng.below(PAGE),
        18..20 => BEHIND - part,
        20..22 => BEHIND + PAGE - part,
        22..24 => LOW - part,
        24 => layout::CODE + rng.below(CODE_LEN),
        25 if far => 0x8000_0000_0000 + rng.below(4096),
        26 if far => 0x8000_0000_0000 - part,
        27 if far => 0xffff_8000_0000_0000 + rng.below(4096),
        28 if far => HIGH + PAGE - part,
        n => {
            let page = match n % 8 {
                0 => LOW + PAGE,
                1 => BEHIND,
                2 if far => HIGH,
                _ => LOW,
            };
            // A few places are shared by many operands.
            let within = if n % 3 == 0 { 0x800 + rng.below(64) } else { rng.below(PAGE - size) };
            page + if unaligned { within } else { within & !(align - 1) }
        }
    }
}

impl Draft<'_> {
    /// A value for a data page, if the place is one and there is room.
    pub(crate) fn plant(&mut self, at: u64, len: u8, bytes: [u8; 16]) {
        if layout::plantable(at, len as u64) && self.start.planted.len() + self.pointers.len() < PLANTED_MAX {
            self.start.planted.push(Planted { at, len, bytes });
        }
    }

    /// An instruction with this encoding, `None` when its operands cannot be drawn (or not this time).
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
                self.point(Pointer::Memory(rsp), later);
            }
            Code::Jmp_rm64 | Code::Call_rm64 if sane => {
                if ins.op0_register() != Register::None {
                    self.point(Pointer::Register(ins.op0_register().number()), later);
                } else if let Some(at) = self.operand_address(ins) {
                    self.point(Pointer::Memory(at), later);
                }
            }
            _ => {}
        }
        let near = matches!(code.op_code().op0_kind(), OpCodeOperandKind::br64_1 | OpCodeOperandKind::br64_4);
        near.then_some(later)
    }

    fn point(&mut self, pointer: Pointer, target: usize) {
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

    /// The linear address of the memory operand, were it executed first.
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

    /// Gives CMPXCHG's memory operand the value that it compares with.
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
