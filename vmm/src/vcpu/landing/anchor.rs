//! The next conditional branch on the way: where a guest that was kicked can be stopped for good.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};

/// Instructions looked at before it is better to let the guest run on.
const LOOK_AHEAD: usize = 64;

/// Bytes of guest code.
pub type Code = [u8; 15];

/// The instruction at `rip`, if its bytes can be had.
pub fn decode(code: &mut impl FnMut(u64, &mut Code) -> usize, rip: u64) -> Option<Instruction> {
    let mut bytes = [0; 15];
    let len = code(rip, &mut bytes);
    let instruction = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// Is it a conditional branch that every counter of them counts? (LOOP and JRCXZ are left to the vendors.)
pub fn is_conditional_branch(instruction: &Instruction) -> bool {
    instruction.is_jcc_short_or_near()
}

/// Address of a conditional branch that the guest is likely to come to soon from `rip`. It is a guess: calls are taken to
/// return, and behind what leaves for an unknown place is code that may come to run. `code` copies what is at an
/// address and says how many bytes there are.
pub fn next(mut code: impl FnMut(u64, &mut Code) -> usize, mut rip: u64) -> Option<u64> {
    let mut after_load_of_ss = false;
    for _ in 0..LOOK_AHEAD {
        let instruction = decode(&mut code, rip)?;
        // Behind a load of SS no breakpoint is met (SDM 3A 6.8.3).
        if is_conditional_branch(&instruction) && !after_load_of_ss {
            return Some(rip);
        }
        after_load_of_ss =
            instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::SS;
        rip = match instruction.flow_control() {
            FlowControl::UnconditionalBranch => instruction.near_branch_target(),
            _ => instruction.next_ip(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(program: &'static [u8]) -> Option<u64> {
        next(
            |at, bytes| {
                let rest = program.get(at as usize..).unwrap_or_default();
                let len = rest.len().min(15);
                bytes[..len].copy_from_slice(&rest[..len]);
                len
            },
            0,
        )
    }

    #[test]
    fn follows_jumps_and_passes_what_comes_back() {
        // nop; jmp +1; (hlt); call; jz
        assert_eq!(at(b"\x90\xeb\x01\xf4\xe8\x01\0\0\0\x74\0"), Some(9));
        // rep movsb; ret; jne
        assert_eq!(at(b"\xf3\xa4\xc3\x0f\x85\0\0\0\0"), Some(3));
        // mov ss, ax; jne; jz
        assert_eq!(at(b"\x8e\xd0\x75\0\x74\0"), Some(4));
        // Jump to itself; LOOP is no branch that all count; bytes missing.
        for none in [&b"\xeb\xfe"[..], b"\xe2\xfe", b"\x0f"] {
            assert_eq!(at(none), None);
        }
    }
}
