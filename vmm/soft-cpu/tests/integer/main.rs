//! The integer instruction set: small guest programs whose outcomes are those of the SDM.

#[path = "../guest/mod.rs"]
mod guest;

mod arithmetic;
mod branches;
mod code;
mod data;
mod harness;
mod prefixes;
mod shifts;
mod stack;
mod strings;

/// Indexes of registers in [`guest::Guest::done`]'s result.
mod r {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
}

/// Bits of RFLAGS.
mod f {
    pub const C: u64 = 1 << 0;
    pub const P: u64 = 1 << 2;
    pub const A: u64 = 1 << 4;
    pub const Z: u64 = 1 << 6;
    pub const S: u64 = 1 << 7;
    pub const D: u64 = 1 << 10;
    pub const O: u64 = 1 << 11;
    pub const STATUS: u64 = C | P | A | Z | S | O;
}
