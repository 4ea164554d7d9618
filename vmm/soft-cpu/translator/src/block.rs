//! Translates a block: counts its instructions, then emits one after the other.

use iced_x86::Instruction;
use soft_cpu::insn::Insn;

use crate::assembler::BlockAssembler;
use crate::effect::{Effect, effect, live_flags};
use crate::slots::SlotTable;

/// The code of the block at RAM offset `start`, whose instructions are `insns`, and also `decoded`. `leaves`:
/// the last one may change RIP. `None` if it cannot be assembled.
pub(crate) fn translate(
    slots: &mut SlotTable,
    start: usize,
    insns: &[Insn],
    decoded: &[Instruction],
    leaves: bool,
) -> Option<Vec<u8>> {
    let mut asm = BlockAssembler::new(slots, start, insns);
    asm.count_block();
    let effects: Vec<Effect> = decoded.iter().zip(insns).map(|(ins, insn)| effect(ins, insn)).collect();
    let live = live_flags(decoded, &effects);
    let mut left = false;
    for (k, ins) in decoded.iter().enumerate() {
        let last = leaves && k + 1 == decoded.len();
        if effects[k] == Effect::Handler {
            if last {
                asm.set_rip_to_end();
            }
            asm.call_handler(k);
            if last {
                asm.leave_at_rip();
                left = true;
            }
        } else {
            let fuses = effects.get(k + 1) == Some(&Effect::Jcc);
            let fused = k > 0 && effects[k - 1] == Effect::Fusing;
            left |= asm.instruction(k, ins, live[k], fuses, fused);
        }
    }
    if !left {
        asm.fall_through();
    }
    asm.finish()
}
