//! Finds the next conditional branch in the guest's code, at which a kicked guest can be stopped.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};

/// How many instructions are searched before it is better to let the guest run on.
const LOOK_AHEAD: usize = 64;

/// Bytes of the guest's code, enough for any instruction.
pub type CodeBytes = [u8; 15];

/// The instruction at `rip`. `None`: its bytes cannot be fetched, or are not an instruction.
pub fn decode(code: &mut impl FnMut(u64, &mut CodeBytes) -> usize, rip: u64) -> Option<Instruction> {
    let mut bytes = [0; 15];
    let len = code(rip, &mut bytes);
    let instruction = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// Whether it is a conditional branch that every CPU's counter counts. (Whether LOOP and JRCXZ count depends on the vendor.)
pub fn is_conditional_branch(instruction: &Instruction) -> bool {
    instruction.is_jcc_short_or_near()
}

/// The address of a conditional branch that the guest is likely to reach soon from `rip`. It is a guess: calls are assumed to
/// return, and after a jump to an unknown target the search goes on with the code that follows. `code` copies the bytes at an
/// address and returns how many there are.
pub fn next_conditional_branch(
    mut code: impl FnMut(u64, &mut CodeBytes) -> usize,
    mut rip: u64,
) -> Option<u64> {
    let mut after_load_of_ss = false;
    for _ in 0..LOOK_AHEAD {
        let instruction = decode(&mut code, rip)?;
        // A breakpoint right after a load of SS is not hit (SDM 3A 6.8.3).
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

    fn branch_after(program: &'static [u8]) -> Option<u64> {
        next_conditional_branch(
            |address, bytes| {
                let rest = program.get(address as usize..).unwrap_or_default();
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
        assert_eq!(branch_after(b"\x90\xeb\x01\xf4\xe8\x01\0\0\0\x74\0"), Some(9));
        // rep movsb; ret; jne
        assert_eq!(branch_after(b"\xf3\xa4\xc3\x0f\x85\0\0\0\0"), Some(3));
        // mov ss, ax; jne; jz
        assert_eq!(branch_after(b"\x8e\xd0\x75\0\x74\0"), Some(4));
        // A jump to itself; LOOP, which not every CPU counts; missing bytes.
        for none in [&b"\xeb\xfe"[..], b"\xe2\xfe", b"\x0f"] {
            assert_eq!(branch_after(none), None);
        }
    }
}
