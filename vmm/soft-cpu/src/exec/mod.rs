//! The handlers of instructions: one function for each form, chosen at decode time.
//!
//! A family of instructions is a module with a function `select(&Instruction, &mut Insn) ->
//! Option<PlaceInBlock>`. For the instructions that it implements it sets [`Insn::exec`], and adjusts
//! operands where the general rules of [`crate::decode`] do not fit. An instruction that no family implements
//! is #UD.

pub mod alu;
pub mod bit;
pub mod branch;
pub mod control;
pub mod cpuid;
pub mod exchange;
pub mod far;
pub mod io;
pub mod misc;
pub mod mmx;
pub mod mov;
pub mod msr;
pub mod muldiv;
mod operand;
pub mod segment;
pub mod shift;
pub mod sse;
pub mod stack;
pub mod string;
pub mod system;
pub mod unary;
pub mod x87;

use iced_x86::Instruction;

use crate::insn::{Insn, PlaceInBlock};

/// CR0.EM: there is no x87 unit, instructions for it and SIMD instructions are refused (SDM 3A, 2.5).
const CR0_EM: u64 = 1 << 2;
/// CR0.TS: the x87 and SIMD registers are those of another task (SDM 3A, 2.5).
const CR0_TS: u64 = 1 << 3;

/// Chooses the handler of an instruction, `None` when it is not implemented.
pub fn select(ins: &Instruction, insn: &mut Insn) -> Option<PlaceInBlock> {
    let families = [
        control::select,
        segment::select,
        alu::select,
        bit::select,
        branch::select,
        exchange::select,
        misc::select,
        mov::select,
        muldiv::select,
        shift::select,
        stack::select,
        string::select,
        unary::select,
        system::select,
        far::select,
        msr::select,
        cpuid::select,
        io::select,
        sse::select,
        mmx::select,
        x87::select,
    ];
    families.iter().find_map(|select| select(ins, insn))
}
