//! Why the CPU stops: exits to the machine, and stops of one instruction.

/// Why [`crate::SoftCpu::run`] returned. Sizes are in bytes; values are zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuExit {
    /// [`crate::RunLimit::until`] instructions have retired.
    Reached,
    /// Another thread asked for a stop; the CPU is at an instruction boundary.
    Kicked,
    /// [`crate::RunLimit::interrupt_window`] was set and the CPU can take an interrupt now.
    InterruptWindow,
    /// HLT retired. The CPU stays halted until an interrupt is injected.
    Hlt,
    /// The guest reads a port. Answer with [`crate::SoftCpu::complete`].
    PioIn {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
    },
    /// The guest writes a port. Acknowledge with [`crate::SoftCpu::complete`] (the value is ignored).
    PioOut {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
        /// What is written.
        value: u32,
    },
    /// The guest reads physical memory outside RAM. Answer with [`crate::SoftCpu::complete`].
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// 1, 2, 4 or 8; the access does not cross a page.
        size: u8,
    },
    /// The guest writes physical memory outside RAM. Acknowledge with [`crate::SoftCpu::complete`].
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// 1, 2, 4 or 8; the access does not cross a page.
        size: u8,
        /// What is written.
        value: u64,
    },
    /// Triple fault: the CPU can only be reset.
    Shutdown,
}

impl CpuExit {
    /// Whether [`crate::SoftCpu::complete`] has to be called before anything else.
    pub fn is_question(&self) -> bool {
        matches!(
            self,
            CpuExit::PioIn { .. }
                | CpuExit::PioOut { .. }
                | CpuExit::MmioRead { .. }
                | CpuExit::MmioWrite { .. }
        )
    }
}

/// An exception (a fault or a debug trap), to be delivered through the guest's IDT (SDM 3A 6.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
}

/// Why an instruction did not simply finish. Details are in the [`crate::Cpu`], so that a `Result<(),
/// CpuStop>` is one byte. An instruction that returns an error has changed nothing except what a second
/// execution would change again, and what `REP` has committed iteration by iteration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CpuStop {
    /// The exception in `Cpu::exception` is to be delivered; the instruction does not retire.
    Fault,
    /// The question in `Cpu::io` is to be answered; then the instruction runs again.
    Io,
    /// A store would change decoded code; the run loop drops that code and runs the instruction again.
    CodeWrite,
    /// A `REP` instruction used up its budget: its iterations are counted, RIP stays at the instruction.
    RepSuspended,
    /// The instruction retires; then the debug trap in `Cpu::exception` is to be delivered.
    Trap,
    /// HLT: retires, then the CPU halts.
    Halt,
    /// A quick handler cannot execute the instruction: the exact handler has to ([`crate::insn::retry`]).
    Slow,
    /// The CPU cannot go on (a fault while delivering a double fault).
    Shutdown,
}
