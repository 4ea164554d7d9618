//! The virtual CPU as the machine sees it: a trait of few methods, exits as data.
//!
//! An engine executes guest instructions until something must be told, says what it is in an [`Exit`], and calls
//! nobody. `soft` is the software CPU, `kvm` the host's own behind `/dev/kvm`; `landing` makes an engine with counted
//! branches as positions of either.

use std::sync::Arc;

use entry::{Position, PositionUnit};
use serde::{Deserialize, Serialize};
use soft_cpu::CpuState;

use crate::machine::digest_of;
use crate::ram::Ram;
use landing::{CountedState, Landings};

mod kvm;
pub mod landing;
pub mod perf;
pub mod simulated;
mod soft;

pub use kvm::{KvmState, KvmVcpu, Positions};
use simulated::SimulatedVcpu;
pub use soft::SoftVcpu;
use soft::start_state;

/// Why the guest stopped. Sizes are in bytes, values are zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// [`Limit::until`] is the position now.
    Reached,
    /// A [`Kick`] came. The position is a whole boundary at which an input may be applied: an instruction has retired
    /// since the last fault or interrupt was delivered, so that the position was not reached before.
    Kicked,
    /// A [`Kick`] came where this engine has no position: nothing may be done to the machine but to run it on. The
    /// next position will be [`Exit::Kicked`].
    Between,
    /// [`Limit::interrupt_window`] was set and the guest takes interrupts now: [`Vcpu::inject`] is allowed.
    InterruptWindow,
    /// The guest waits for an interrupt. A halted guest that is run again says so again at once.
    Halted,
    /// A port is read. Answer by [`Vcpu::complete`].
    PioIn {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
    },
    /// A port is written. Acknowledge by [`Vcpu::complete`].
    PioOut {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
        /// What is written.
        value: u32,
    },
    /// Memory outside RAM is read. Answer by [`Vcpu::complete`].
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// 1, 2, 4 or 8.
        size: u8,
    },
    /// Memory outside RAM is written. Acknowledge by [`Vcpu::complete`].
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// 1, 2, 4 or 8.
        size: u8,
        /// What is written.
        value: u64,
    },
    /// Triple fault.
    Shutdown,
}

/// How far and how a [`Vcpu::run`] goes.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// Stop exactly here, `None`: run until something happens.
    pub until: Option<Position>,
    /// Stop as soon as the guest takes interrupts.
    pub interrupt_window: bool,
    /// Guest time minus what the engine itself adds (instructions, where the unit is that), in ns.
    pub time_offset_ns: u64,
}

/// State of the boot protocol's 64-bit entry, for any engine. Flat segments, paging on, interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// RIP.
    pub entry: u64,
    /// RSI: guest-physical address of the boot parameters.
    pub boot_params: u64,
    /// CR3: guest-physical address of page tables that map low memory to itself.
    pub page_tables: u64,
    /// GDTR: guest-physical address of a table with the selectors 0x10 (code) and 0x18 (data).
    pub gdt: u64,
}

/// Whole state of a vCPU, by engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VcpuState {
    /// Of the software CPU.
    Soft(Box<CpuState>),
    /// Of the engine on KVM.
    Kvm(Box<KvmState>),
    /// Of an engine whose positions are counted branches.
    Counted(Box<CountedState>),
}

/// Names of the general registers, in their encoding's order.
const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

impl VcpuState {
    /// The registers. `retired` is the position's count, and engines without a TLB of their own leave it empty.
    pub fn cpu(&self) -> &CpuState {
        match self {
            VcpuState::Soft(cpu) => cpu,
            VcpuState::Kvm(kvm) => &kvm.cpu,
            VcpuState::Counted(counted) => counted.engine.cpu(),
        }
    }

    /// Registers by name, to say what differs between two states. What is too large to show is a digest of it.
    pub fn registers(&self) -> Vec<(&'static str, u128)> {
        if let VcpuState::Counted(counted) = self {
            let [exits, branches, ..] = counted.at;
            let position = [("exits", exits.into()), ("branches", branches.into())];
            return [counted.engine.registers(), position.to_vec()].concat();
        }
        let cpu = self.cpu();
        let sys = &cpu.sys;
        let mut registers: Vec<_> = GENERAL.into_iter().zip(cpu.gpr.map(u128::from)).collect();
        registers.extend([
            ("rip", cpu.rip.into()),
            ("rflags", cpu.rflags.into()),
            ("fs base", cpu.fs_base.into()),
            ("gs base", cpu.gs_base.into()),
            ("cr0", sys.cr0.into()),
            ("cr2", sys.cr2.into()),
            ("cr3", sys.cr3.into()),
            ("cr4", sys.cr4.into()),
            ("efer", sys.efer.into()),
            ("other system registers", digest_of(sys).0),
            ("xmm", digest_of(&cpu.xmm).0),
            ("mxcsr", cpu.mxcsr.into()),
            ("x87", digest_of(&cpu.x87).0),
            ("tlb", digest_of(&cpu.tlb).0),
            ("retired", cpu.retired.into()),
            ("interrupt shadow", digest_of(&cpu.shadow).0),
            ("halted", cpu.halted.into()),
            ("interrupt", cpu.interrupt.map_or(u128::MAX, u128::from)),
        ]);
        if let VcpuState::Kvm(kvm) = self {
            registers.push(("host", kvm.host.into()));
            registers.extend([("interrupts since", kvm.within.into()), ("trace", kvm.trace.into())]);
        }
        registers
    }

    /// Names of the registers that differ.
    pub fn differences(&self, other: &VcpuState) -> Vec<&'static str> {
        let (ours, theirs) = (self.registers(), other.registers());
        ours.iter().zip(&theirs).filter(|(a, b)| a != b).map(|(a, _)| a.0).collect()
    }
}

/// An engine failed: the host is out of the pair.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The state was saved by another engine; use that one.
    #[error("the saved vCPU is of another engine than the {0} that should go on with it")]
    OtherEngine(&'static str),
    /// The position cannot be landed on by this engine.
    #[error("the {engine} engine is past {target:?} already, at {now:?}")]
    Overshot {
        /// Which engine.
        engine: &'static str,
        /// Where it should have stopped.
        target: Position,
        /// Where it is.
        now: Position,
    },
    /// Landing by a counter failed for another reason.
    #[error(transparent)]
    Landing(#[from] landing::LandingError),
    /// A call of KVM failed; the host's kernel log may say more.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// Which call.
        what: &'static str,
        /// The host's error.
        source: kvm_ioctls::Error,
    },
    /// The host's KVM cannot do what the engine needs; use the soft engine.
    #[error("this host's KVM has not what the engine needs: {0}")]
    KvmLacks(&'static str),
    /// Which counter would be exact on this CPU is not known; use other positions (see `vmft doctor`).
    #[error("this host's CPU ({0}) is not in the table of exact branch counters")]
    UnknownCounter(String),
    /// The host's CPU is too old; use the soft engine.
    #[error("the host's CPU lacks features of CPUID {place}: {missing:#x}")]
    CpuLacks {
        /// Leaf and register.
        place: &'static str,
        /// The bits.
        missing: u32,
    },
    /// The state was saved on a host with another CPU model or KVM; go on with it on an equal one.
    #[error("the vCPU was saved on a host whose CPU or KVM differs")]
    OtherCpu,
    /// KVM cannot execute an instruction of this guest; use the soft engine, or a host that does not emulate ring 0.
    #[error("KVM cannot execute the instruction at {rip:#x} (suberror {suberror}): {bytes:02x?}")]
    CannotExecute {
        /// Where.
        rip: u64,
        /// KVM's reason.
        suberror: u32,
        /// The instruction, if KVM says it.
        bytes: Vec<u8>,
    },
    /// KVM returned for a reason that this engine does not know.
    #[error("KVM stopped at {rip:#x} for the unknown reason {reason}")]
    UnknownExit {
        /// Where.
        rip: u64,
        /// KVM_EXIT_*.
        reason: u32,
    },
    /// The guest debugs itself and is in the middle of an exception; save a little later.
    #[error("exception {0} is on its way: this is no boundary to save the vCPU at")]
    ExceptionPending(u8),
}

/// Registers that a program computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct General {
    /// RAX to R15 in their encoding's order.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// Makes a running vCPU return [`Exit::Kicked`], from any thread.
pub trait Kick: Send + Sync {
    /// Asks for it. A kick of a vCPU that is not running takes effect at its next run.
    fn kick(&self);
}

/// An engine. Its caller owns RAM, devices and time; it owns registers.
pub trait Vcpu: Send {
    /// Runs the guest until something is to be told. Pages that [`Ram::take_changed`] lists are taken note of first.
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError>;

    /// Answers the last exit with the value read (ignored for writes). `None`: run on, or [`Vcpu::settle`] for a whole
    /// boundary; else the next thing that the instruction asks.
    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError>;

    /// Makes the position a whole boundary after [`Vcpu::complete`], which may leave it to the next run to finish the
    /// instruction. `None`: it is one; else the next thing that the instruction asks.
    fn settle(&mut self, _ram: &mut Ram) -> Result<Option<Exit>, VcpuError> {
        Ok(None)
    }

    /// Where the guest is.
    fn position(&self) -> Position;

    /// Delivers an external interrupt before the next instruction. Only after [`Exit::InterruptWindow`].
    fn inject(&mut self, vector: u8) -> Result<(), VcpuError>;

    /// The state at a whole boundary.
    fn save(&self) -> Result<VcpuState, VcpuError>;

    /// Takes over a saved state, position included, and forgets all that was derived from RAM.
    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError>;

    /// Puts the CPU at the start of a boot. The position goes on.
    fn reset(&mut self, start: &Start) -> Result<(), VcpuError>;

    /// A handle that stops the CPU from other threads.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Reports all pages that the guest wrote since the last call by [`Ram::note_written`].
    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError>;

    /// Changes registers at a whole boundary.
    fn change_registers(&mut self, change: &mut dyn FnMut(&mut General)) -> Result<(), VcpuError>;

    /// A check word for each synchronous exit since the last call, where exits are positions: equal for equal guests.
    fn take_exits(&mut self) -> Vec<u16> {
        Vec::new()
    }

    /// What became of positions that had to be landed on, for engines that count branches.
    fn landings(&self) -> Landings {
        Landings::default()
    }
}

/// An engine, chosen at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// The software CPU.
    Soft,
    /// The host's CPU behind KVM; positions are synchronous exits.
    KvmSync,
    /// The same, a position an instruction: for tests, thousands of times slower.
    KvmStep,
    /// The host's CPU behind KVM; positions are branches that its counter counts.
    KvmCounter,
    /// The same with a counter that is simulated by single steps: for tests.
    KvmStepCounter,
    /// The software CPU with a simulated branch counter: for tests.
    SoftCounter,
    /// The software CPU without translated code: slower, and otherwise the same to the last bit.
    Interpreter,
}

impl Engine {
    /// All of them.
    pub const ALL: [Engine; 7] = [
        Engine::Soft,
        Engine::KvmSync,
        Engine::KvmStep,
        Engine::KvmCounter,
        Engine::KvmStepCounter,
        Engine::SoftCounter,
        Engine::Interpreter,
    ];

    /// Its name in identities: the same for those that rebuild each other's machines.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Soft | Engine::Interpreter => "soft",
            Engine::KvmSync => "kvm-sync",
            Engine::KvmStep => "kvm-step",
            Engine::KvmCounter => "kvm-counter",
            Engine::KvmStepCounter => "kvm-step-counter",
            Engine::SoftCounter => "soft-counter",
        }
    }

    /// The engine of a name.
    pub fn named(name: &str) -> Option<Engine> {
        Engine::ALL.into_iter().find(|engine| engine.name() == name)
    }

    /// What the engine counts.
    pub fn unit(self) -> PositionUnit {
        match self {
            Engine::Soft | Engine::Interpreter => PositionUnit::Instructions,
            Engine::KvmSync => PositionUnit::SynchronousExits,
            Engine::KvmStep => PositionUnit::Steps,
            Engine::KvmCounter | Engine::KvmStepCounter | Engine::SoftCounter => PositionUnit::Branches,
        }
    }

    /// The host's CPU executes the guest, which cannot trap all that tells the time or chance.
    pub fn is_kvm(self) -> bool {
        !matches!(self, Engine::Soft | Engine::Interpreter | Engine::SoftCounter)
    }

    /// Makes a vCPU for that RAM.
    pub fn vcpu(self, ram: &Ram) -> Result<Box<dyn Vcpu>, VcpuError> {
        match self {
            Engine::Soft => Ok(Box::new(SoftVcpu::translating(ram.len()))),
            Engine::Interpreter => Ok(Box::new(SoftVcpu::new(ram.len()))),
            Engine::KvmSync => Ok(Box::new(KvmVcpu::new(ram, Positions::Exits)?)),
            Engine::KvmStep => Ok(Box::new(KvmVcpu::new(ram, Positions::Steps)?)),
            Engine::KvmCounter => kvm::counted(ram),
            Engine::KvmStepCounter => kvm::counted_by_steps(ram),
            Engine::SoftCounter => Ok(Box::new(SimulatedVcpu::for_tests(ram.len()))),
        }
    }
}
