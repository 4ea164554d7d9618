//! What a case starts from and what it ends in.

/// Bytes of an FXSAVE image that hold state: header, ST0 to ST7, XMM0 to XMM15.
pub const FX_LEN: usize = 416;

/// x87, MMX and SSE state as FXSAVE lays it out (SDM 1, table 10-2), without instruction and data pointers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fx {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word, TOP included.
    pub fsw: u16,
    /// A bit for each *physical* x87 register in use.
    pub in_use: u8,
    /// MXCSR.
    pub mxcsr: u32,
    /// ST0 to ST7: significand, sign and exponent.
    pub st: [(u64, u16); 8],
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
}

impl Fx {
    /// TOP of the status word.
    pub fn top(&self) -> usize {
        (self.fsw >> 11 & 7) as usize
    }

    /// The image that FXRSTOR takes.
    pub fn to_image(&self) -> [u8; FX_LEN] {
        let mut b = [0; FX_LEN];
        b[..2].copy_from_slice(&self.fcw.to_le_bytes());
        b[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        b[4] = self.in_use;
        b[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        for (slot, (significand, sign_exponent)) in b[32..160].chunks_mut(16).zip(self.st) {
            slot[..8].copy_from_slice(&significand.to_le_bytes());
            slot[8..10].copy_from_slice(&sign_exponent.to_le_bytes());
        }
        for (slot, v) in b[160..].chunks_mut(16).zip(self.xmm) {
            slot.copy_from_slice(&v.to_le_bytes());
        }
        b
    }

    /// The state in an image that FXSAVE gave.
    pub fn from_image(b: &[u8; FX_LEN]) -> Fx {
        let word = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        let wide = |at: usize| u128::from_le_bytes(b[at..at + 16].try_into().expect("16 bytes"));
        Fx {
            fcw: word(0),
            fsw: word(2),
            in_use: b[4],
            mxcsr: word(24) as u32 | (word(26) as u32) << 16,
            st: std::array::from_fn(|i| {
                let v = wide(32 + 16 * i);
                (v as u64, (v >> 64) as u16)
            }),
            xmm: std::array::from_fn(|i| wide(160 + 16 * i)),
        }
    }
}

/// Bytes that a case has in memory before it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planted {
    /// Linear address; all bytes are within writable data pages.
    pub at: u64,
    /// How many of `bytes` count.
    pub len: u8,
    /// The bytes.
    pub bytes: [u8; 16],
}

/// Most bytes of code that a case has.
pub const CODE_MAX: usize = 256;
/// Most values that a case plants in memory.
pub const PLANTED_MAX: usize = 32;

/// All that decides what a case does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// RAX to R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// x87 and SSE state.
    pub fx: Fx,
    /// Where the code begins, and RIP.
    pub rip: u64,
    /// The code, at most [`CODE_MAX`] bytes, within the code pages.
    pub code: Vec<u8>,
    /// Memory, at most [`PLANTED_MAX`] values.
    pub planted: Vec<Planted>,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With an exception; INT3 is the ordinary end.
    Exception {
        /// Vector, 0 to 31.
        vector: u8,
        /// Error code; 0 for vectors without one.
        error: u32,
        /// CR2; meaningful for page faults.
        cr2: u64,
    },
    /// With a system call, which is no business of a case.
    SystemCall,
    /// Not within the time or number of instructions allowed.
    Never,
    /// In a way that no CPU may end: a panic, a triple fault, an exit to the machine.
    Broken(String),
}

/// The state that a case ended in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// RAX to R15.
    pub gpr: [u64; 16],
    /// RIP as the exception reported it.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// x87 and SSE state.
    pub fx: Fx,
    /// How it ended.
    pub end: End,
    /// Words of memory that are not as in [`crate::layout::background`]: index and value, ascending.
    pub memory: Vec<(u32, u64)>,
}
