//! The start state and the outcome of a case.

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
    /// How many of `bytes` are planted.
    pub len: u8,
    /// The bytes.
    pub bytes: [u8; 16],
}

/// Maximum size of a case's code in bytes.
pub const CODE_MAX: usize = 256;
/// Maximum number of values that a case plants in memory.
pub const PLANTED_MAX: usize = 32;

/// The start state of a case, which determines everything that it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseStart {
    /// RAX to R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// x87 and SSE state.
    pub fx: Fx,
    /// The address of the code, and RIP.
    pub rip: u64,
    /// The code, at most [`CODE_MAX`] bytes, within the code pages.
    pub code: Vec<u8>,
    /// Values in memory, at most [`PLANTED_MAX`].
    pub planted: Vec<Planted>,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaseEnd {
    /// With an exception; the ordinary end is INT3.
    Exception {
        /// Vector, 0 to 31.
        vector: u8,
        /// Error code; 0 for vectors without one.
        error: u32,
        /// CR2; meaningful for page faults.
        cr2: u64,
    },
    /// With a system call, which a case should not make.
    SystemCall,
    /// It did not end within the allowed time or number of instructions.
    Never,
    /// In a way that is an error of the soft CPU: a panic, a triple fault, an exit to the machine.
    Broken(String),
}

/// The state that a case ended in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseOutcome {
    /// RAX to R15.
    pub gpr: [u64; 16],
    /// RIP as the exception reported it.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// x87 and SSE state.
    pub fx: Fx,
    /// How it ended.
    pub end: CaseEnd,
    /// Words of memory that differ from [`crate::layout::background`]: index and value, in ascending order.
    pub memory: Vec<(u32, u64)>,
}
