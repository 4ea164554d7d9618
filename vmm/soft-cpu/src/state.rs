//! The CPU's registers, and their form for saving and digests.

use serde::{Deserialize, Serialize};

use crate::exit::{CpuExit, CpuStop, Exception};
use crate::flags::Flags;
use crate::insn::Single;
use crate::int::REGS;
use crate::tlb::{FastTlb, Tlb, TlbState};

/// Index of the RIP that RIP-relative operands count from. It and the following are in the register file
/// after RAX…R15, so that computing an address needs no case distinction.
pub const RIP_BASE: u8 = 16;
/// A register that is always zero.
pub const ZERO: u8 = 17;
/// Base of FS.
pub const FS_BASE: u8 = 18;
/// Base of GS.
pub const GS_BASE: u8 = 19;
/// A register that is always 2 GiB: the index register of a RIP-relative operand whose displacement, counted
/// from the start of the block, does not fit into 32 bits.
pub const PLUS_2G: u8 = 20;
/// A register that is always -2 GiB; see [`PLUS_2G`].
pub const MINUS_2G: u8 = 21;

/// Indexes of the general registers that instructions use implicitly.
#[allow(missing_docs)]
pub mod reg {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R11: u8 = 11;
}

/// Indexes into [`Registers::seg`], in the encoding of Sreg (SDM 2, table B-8).
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// A segment register with its hidden part. The bases of FS and GS live in the register file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Access rights: descriptor bits 55:52 and 47:40, as in VMCS "access rights" (SDM 3C, table 24-2).
    pub attr: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base (unused for ES, CS, SS, DS in 64-bit mode).
    pub base: u64,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRegister {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// What the last instruction inhibits until the next one has retired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shadow {
    /// Nothing.
    #[default]
    None,
    /// External interrupts (STI).
    Interrupts,
    /// External interrupts and debug exceptions (MOV SS, POP SS, LSS).
    Everything,
}

/// System, debug and model-specific registers, which only special instructions change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS, _ESP, _EIP.
    pub sysenter: [u64; 3],
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST: what the guest has added to its time-stamp counter.
    pub tsc_adjust: u64,
}

/// x87 and MMX state. Register numbers are physical; ST(i) is `(top + i) & 7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct X87 {
    /// Significands, which are also MM0 to MM7.
    pub significand: [u64; 8],
    /// Signs and exponents.
    pub sign_exponent: [u16; 8],
    /// Control word.
    pub control: u16,
    /// Status word without TOP.
    pub status: u16,
    /// TOP, 0 to 7.
    pub top: u8,
    /// A bit for each physical register that is in use (the abridged tag word of FXSAVE).
    pub in_use: u8,
    /// Last opcode (11 bits).
    pub opcode: u16,
    /// Last instruction pointer.
    pub instruction: u64,
    /// Last data pointer.
    pub data: u64,
}

impl Default for X87 {
    /// As FNINIT leaves it.
    fn default() -> X87 {
        X87 {
            significand: [0; 8],
            sign_exponent: [0; 8],
            control: 0x37f,
            status: 0,
            top: 0,
            in_use: 0,
            opcode: 0,
            instruction: 0,
            data: 0,
        }
    }
}

/// The answers that an instruction that left the CPU has got so far, so that it can be run again.
#[derive(Clone, Debug, Default)]
pub(crate) struct IoReplies {
    /// The answers, in the order of the questions.
    pub(crate) values: Vec<u64>,
    /// How many of them this execution has used.
    pub(crate) used: usize,
}

/// The CPU: its architectural state, and caches that make execution fast.
pub struct Cpu {
    /// RAX…R15, then [`RIP_BASE`], [`ZERO`], [`FS_BASE`], [`GS_BASE`].
    pub regs: [u64; REGS],
    /// While a handler runs: the address of the end of its block (so the end of the instruction, for those
    /// that end a block). Between instructions: the address of the next.
    pub rip: u64,
    /// RFLAGS.
    pub flags: Flags,
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// MXCSR.
    pub mxcsr: u32,
    /// x87 and MMX.
    pub x87: X87,
    /// System registers.
    pub sys: Registers,
    /// Instructions retired (before the running block).
    pub retired: u64,
    /// Added to `retired` to give the time-stamp counter: guest time in ns.
    pub tsc_offset: u64,
    /// What is inhibited for one instruction.
    pub shadow: Shadow,
    /// HLT has retired and no interrupt has been delivered since.
    pub halted: bool,
    /// External interrupt accepted and not yet delivered.
    pub interrupt: Option<u8>,
    /// The TLB, whose contents are state that the guest can see.
    pub tlb: Tlb,

    /// A faster copy of part of the TLB; not state.
    pub(crate) fast: FastTlb,
    /// The page that the last instruction was fetched from.
    pub(crate) fetch: FetchPage,
    /// Which part of `fast` applies: 0 at CPL 0 to 2, 1 at CPL 3; plus [`WATCHED`].
    pub(crate) mode: usize,
    /// Whether TF was set before the instruction that is being stepped ([`crate::debug`]).
    pub(crate) single_step: bool,
    /// Data breakpoints that the instruction has hit, a bit each.
    pub(crate) breakpoints_met: u64,
    /// RAM below [`HOLE_START`], bytes.
    pub(crate) ram_low: u64,
    /// RAM in all, bytes.
    pub(crate) ram_len: u64,
    /// For each page of RAM: a bit for each 64-byte chunk that has decoded code.
    pub(crate) code_chunks: Vec<u64>,
    /// Pages whose decoded code a store changes or wants to change: the run loop drops it.
    pub(crate) code_written: Vec<u32>,
    /// Whether stores to decoded code are done; otherwise they end in [`CpuStop::CodeWrite`].
    pub(crate) code_write_allowed: bool,
    /// Pages written since they were last taken, a bit each, and the same as a list.
    pub(crate) written: Vec<u64>,
    pub(crate) written_list: Vec<u32>,
    /// How many instructions of the block come after the one that stopped or jumped, and did not run.
    pub(crate) left: usize,
    /// The exact handler that [`crate::insn::retry`] calls.
    pub(crate) exact: Single,
    /// How many iterations a REP instruction may run.
    pub(crate) rep_budget: u64,
    /// The exception of [`CpuStop::Fault`] and [`CpuStop::Trap`].
    pub(crate) exception: Exception,
    /// The question of [`CpuStop::Io`].
    pub(crate) io: CpuExit,
    pub(crate) io_replies: IoReplies,
}

/// The page that the last instruction was fetched from. As long as this is set, the instruction TLB has an
/// entry for the page that allows another fetch, and the fetch would change nothing.
#[derive(Clone, Copy)]
pub(crate) struct FetchPage {
    /// Linear page number, or a number that no page has.
    page: u64,
    /// Its offset in RAM.
    ram: usize,
}

impl FetchPage {
    pub(crate) const NONE: FetchPage = FetchPage { page: u64::MAX, ram: 0 };

    /// The page of linear address `rip`, which lies at RAM offset `ram`.
    pub(crate) fn new(rip: u64, ram: usize) -> FetchPage {
        FetchPage { page: rip >> 12, ram }
    }

    /// RAM offset of the instruction at `rip`, if it is in this page.
    #[inline(always)]
    pub(crate) fn offset(&self, rip: u64) -> Option<usize> {
        (rip >> 12 == self.page).then_some(self.ram + (rip as usize & 4095))
    }
}

/// The whole state of a CPU at an instruction boundary. CPUs with equal states behave the same from then on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuState {
    pub gpr: [u64; 16],
    pub fs_base: u64,
    pub gs_base: u64,
    pub rip: u64,
    pub rflags: u64,
    pub xmm: [u128; 16],
    pub mxcsr: u32,
    pub x87: X87,
    pub sys: Registers,
    pub retired: u64,
    pub tsc_offset: u64,
    pub shadow: Shadow,
    pub halted: bool,
    pub interrupt: Option<u8>,
    pub tlb: TlbState,
}

/// In [`Cpu::mode`]: data breakpoints or alignment have to be checked, so that no access may take the fast
/// path.
pub(crate) const WATCHED: usize = 2;

fn fixed_registers() -> [u64; REGS] {
    let mut regs = [0; REGS];
    regs[PLUS_2G as usize] = 1 << 31;
    regs[MINUS_2G as usize] = (1u64 << 31).wrapping_neg();
    regs
}

/// Guest-physical address where the hole for devices begins; the rest of RAM lies from 4 GiB up.
pub const HOLE_START: u64 = 0xc000_0000;
/// Guest-physical address of the end of the hole.
pub const HOLE_END: u64 = 1 << 32;

impl Cpu {
    /// A CPU for `ram_len` bytes of RAM, as after reset; it is not in 64-bit mode until a state is restored.
    pub(crate) fn new(ram_len: u64) -> Cpu {
        let pages = ram_len.div_ceil(4096) as usize;
        Cpu {
            regs: fixed_registers(),
            rip: 0,
            flags: Flags::from_bits(0),
            xmm: [0; 16],
            mxcsr: 0x1f80,
            x87: X87::default(),
            sys: Registers::default(),
            retired: 0,
            tsc_offset: 0,
            shadow: Shadow::None,
            halted: false,
            interrupt: None,
            tlb: Tlb::default(),
            fast: FastTlb::default(),
            fetch: FetchPage::NONE,
            mode: 0,
            single_step: false,
            breakpoints_met: 0,
            ram_low: ram_len.min(HOLE_START),
            ram_len,
            code_chunks: vec![0; pages],
            code_written: Vec::new(),
            code_write_allowed: false,
            written: vec![0; pages.div_ceil(64)],
            written_list: Vec::new(),
            left: 0,
            exact: |cpu, _, _| cpu.undefined(),
            rep_budget: 0,
            exception: Exception { vector: 0, error: None },
            io: CpuExit::Reached,
            io_replies: IoReplies::default(),
        }
    }

    /// Current privilege level.
    #[inline(always)]
    pub fn cpl(&self) -> u8 {
        (self.sys.seg[seg::SS].attr >> 5 & 3) as u8
    }

    /// To be called after every change of SS's DPL, that is of the privilege level.
    pub(crate) fn cpl_changed(&mut self) {
        self.mode = self.mode & WATCHED | (self.cpl() == 3) as usize;
        self.fetch = FetchPage::NONE;
    }

    /// Whether data accesses of instructions have user rights.
    #[inline(always)]
    pub(crate) fn user(&self) -> bool {
        self.mode & 1 != 0
    }

    /// Raises a fault: `return cpu.raise(...)`.
    #[cold]
    pub fn raise<T>(&mut self, vector: u8, error: Option<u32>) -> Result<T, CpuStop> {
        self.exception = Exception { vector, error };
        Err(CpuStop::Fault)
    }

    /// #UD.
    #[cold]
    pub fn undefined<T>(&mut self) -> Result<T, CpuStop> {
        self.raise(6, None)
    }

    /// #GP(error).
    #[cold]
    pub fn general_protection<T>(&mut self, error: u32) -> Result<T, CpuStop> {
        self.raise(13, Some(error))
    }

    /// Offset into RAM of a guest-physical address, `None` outside RAM.
    #[inline]
    pub fn ram_offset(&self, addr: u64) -> Option<usize> {
        if addr < self.ram_low {
            Some(addr as usize)
        } else if addr >= HOLE_END && addr - HOLE_END < self.ram_len - self.ram_low {
            Some((addr - HOLE_END + self.ram_low) as usize)
        } else {
            None
        }
    }

    /// Whether an external interrupt could be delivered before the next instruction.
    pub fn interruptible(&self) -> bool {
        self.flags.non_status() & crate::flags::bits::IF != 0
            && self.shadow == Shadow::None
            && self.interrupt.is_none()
    }

    /// The time-stamp counter at the start of the running block: guest time in ns, plus what the guest has
    /// added to it.
    pub fn tsc(&self) -> u64 {
        self.retired.wrapping_add(self.tsc_offset).wrapping_add(self.sys.tsc_adjust)
    }

    /// The whole state. To be called at an instruction boundary.
    pub fn save(&self) -> CpuState {
        CpuState {
            gpr: std::array::from_fn(|i| self.regs[i]),
            fs_base: self.regs[FS_BASE as usize],
            gs_base: self.regs[GS_BASE as usize],
            rip: self.rip,
            rflags: self.flags.to_bits(),
            xmm: self.xmm,
            mxcsr: self.mxcsr,
            x87: self.x87,
            sys: self.sys,
            retired: self.retired,
            tsc_offset: self.tsc_offset,
            shadow: self.shadow,
            halted: self.halted,
            interrupt: self.interrupt,
            tlb: self.tlb.save(),
        }
    }

    /// Replaces the state by a saved one.
    pub fn restore(&mut self, s: &CpuState) {
        self.regs = fixed_registers();
        self.regs[..16].copy_from_slice(&s.gpr);
        self.regs[FS_BASE as usize] = s.fs_base;
        self.regs[GS_BASE as usize] = s.gs_base;
        self.rip = s.rip;
        self.flags = Flags::from_bits(s.rflags);
        self.xmm = s.xmm;
        self.mxcsr = s.mxcsr;
        self.x87 = s.x87;
        self.sys = s.sys;
        self.retired = s.retired;
        self.tsc_offset = s.tsc_offset;
        self.shadow = s.shadow;
        self.halted = s.halted;
        self.interrupt = s.interrupt;
        self.tlb.restore(&s.tlb);
        self.fast.flush();
        self.cpl_changed();
    }
}
