//! The virtual CPU as the machine sees it: a trait of few methods, exits as data.
//!
//! An engine executes guest instructions until the machine has to do something, and returns what that is as an [`Exit`]; it
//! never calls out. `soft` is the software CPU and `kvm` the host's own CPU behind `/dev/kvm`; `landing` turns either into an
//! engine whose positions are counted branches.

use std::sync::Arc;

use entry::{Position, PositionUnit};
use serde::{Deserialize, Serialize};
use soft_cpu::CpuState;

use crate::digest::digest_of;
use crate::ram::Ram;
use landing::{CountingState, Landings};

mod kvm;
pub mod landing;
pub mod perf;
pub mod simulated;
mod soft;

pub use kvm::{KvmPositions, KvmState, KvmVcpu};
use simulated::SimulatedVcpu;
pub use soft::SoftVcpu;
use soft::start_state;

/// Why the guest stopped. Sizes are in bytes, values are zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest has reached [`Limit::until`].
    Reached,
    /// A [`Kick`] came. The guest is at an instruction boundary at which an input may be applied: an instruction has retired
    /// since the last fault or interrupt was delivered, so that the guest was not at this position before.
    Kicked,
    /// A [`Kick`] came where this engine has no position. The machine may only be run on; at the next position the engine
    /// will return [`Exit::Kicked`].
    Between,
    /// [`Limit::interrupt_window`] was set and the guest can take an interrupt now: [`Vcpu::inject`] is allowed.
    InterruptWindow,
    /// The guest waits for an interrupt. A halted guest that is run again returns this again at once.
    Halted,
    /// The guest reads a port. Answer with [`Vcpu::complete`].
    PioIn {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
    },
    /// The guest writes to a port. Acknowledge with [`Vcpu::complete`].
    PioOut {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
        /// The value written.
        value: u32,
    },
    /// The guest reads memory outside RAM. Answer with [`Vcpu::complete`].
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// 1, 2, 4 or 8.
        size: u8,
    },
    /// The guest writes to memory outside RAM. Acknowledge with [`Vcpu::complete`].
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// 1, 2, 4 or 8.
        size: u8,
        /// The value written.
        value: u64,
    },
    /// Triple fault.
    Shutdown,
}

/// How far [`Vcpu::run`] runs the guest, and at which guest time.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// Stop exactly at this position; `None`: at the next exit only.
    pub until: Option<Position>,
    /// Stop as soon as the guest can take an interrupt.
    pub interrupt_window: bool,
    /// Guest time in ns, minus what the engine adds to it (a nanosecond for each instruction, where it counts them).
    pub time_offset_ns: u64,
}

/// Where a boot starts, by the 64-bit boot protocol: flat segments, paging on, interrupts off.
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

/// The whole state of a vCPU, by engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VcpuState {
    /// State of the software CPU.
    Soft(Box<CpuState>),
    /// State of the engine on KVM.
    Kvm(Box<KvmState>),
    /// State of an engine whose positions are counted branches.
    Counting(Box<CountingState>),
}

/// Names of the general registers, in the order of their encoding.
const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

impl VcpuState {
    /// The registers. `retired` is the position's count; `tlb` is empty for engines that have no TLB of their own.
    pub fn cpu(&self) -> &CpuState {
        match self {
            VcpuState::Soft(cpu) => cpu,
            VcpuState::Kvm(kvm) => &kvm.cpu,
            VcpuState::Counting(counted) => counted.engine.cpu(),
        }
    }

    /// Registers by name, to report what differs between two states. Those that are too large to show are digests.
    pub fn registers(&self) -> Vec<(&'static str, u128)> {
        if let VcpuState::Counting(counted) = self {
            let [exits, branches, ..] = counted.position;
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

/// An engine failed: this host cannot run the guest any further.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The state was saved by another engine; use that one.
    #[error("the vCPU's state was saved by an engine other than {0}; use the engine that saved it")]
    OtherEngine(&'static str),
    /// The engine has run past the position at which it should have stopped.
    #[error("the {engine} engine cannot stop at {target:?}: it is already past it, at {now:?}")]
    Overshot {
        /// The engine's name.
        engine: &'static str,
        /// The position at which it should have stopped.
        target: Position,
        /// The position at which it is.
        now: Position,
    },
    /// The engine could not stop at a position by the branch counter, for another reason.
    #[error(transparent)]
    Landing(#[from] landing::LandingError),
    /// A call of KVM failed; the host's kernel log may say more.
    #[error("KVM: {what} failed: {source}")]
    Kvm {
        /// What the call was to do.
        what: &'static str,
        /// The host's error.
        source: kvm_ioctls::Error,
    },
    /// The host's KVM cannot do what the engine needs; use the software CPU.
    #[error("this host's KVM lacks {0}; use --cpu soft")]
    KvmLacks(&'static str),
    /// It is not known which counter would be exact on this CPU; use other positions (see `vmft doctor`).
    #[error(
        "this host's CPU ({0}) is not in the table of CPUs whose branch counter is known to be exact; use --positions sync or --cpu soft"
    )]
    UnknownCounter(String),
    /// The host's CPU is too old; use the software CPU.
    #[error(
        "the host's CPU lacks features that guests on KVM need (CPUID {place}, bits {missing:#x}); use --cpu soft"
    )]
    CpuLacks {
        /// Leaf and register of CPUID.
        place: &'static str,
        /// The missing bits.
        missing: u32,
    },
    /// The state was saved on a host with another CPU model or KVM; restore it on an equal one.
    #[error(
        "the vCPU's state was saved on a host with another CPU model or KVM; restore it on an equal host"
    )]
    OtherCpu,
    /// KVM cannot execute an instruction of this guest; use the software CPU, or a host that does not emulate ring 0.
    #[error(
        "KVM cannot execute the guest's instruction at {rip:#x} (suberror {suberror}): {bytes:02x?}; use --cpu soft"
    )]
    CannotExecute {
        /// The address of the guest's instruction.
        rip: u64,
        /// KVM's reason.
        suberror: u32,
        /// The bytes of the instruction, if KVM reports them.
        bytes: Vec<u8>,
    },
    /// KVM returned an exit that this engine does not know.
    #[error("KVM stopped the guest at {rip:#x} with the unknown exit reason {reason}")]
    UnknownExit {
        /// The address of the guest's instruction.
        rip: u64,
        /// KVM_EXIT_*.
        reason: u32,
    },
    /// The guest debugs itself and is in the middle of an exception; save a little later.
    #[error(
        "the vCPU cannot be saved while exception {0} is being delivered to the guest; try again a little later"
    )]
    ExceptionPending(u8),
}

/// A limitation of an engine, of which the user should be told. It works nevertheless.
#[derive(Debug, thiserror::Error)]
pub enum VcpuWarning {
    /// The host allows no memory for translated code.
    #[error(
        "no memory for translated code ({0}): the software CPU interprets the guest's code, which is slower"
    )]
    NoTranslatedCode(std::io::Error),
}

/// The general registers, RIP and RFLAGS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralRegisters {
    /// RAX to R15 in the order of their encoding.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// Makes a running vCPU return [`Exit::Kicked`], from any thread.
pub trait Kick: Send + Sync {
    /// Asks the vCPU to stop. A kick of a vCPU that is not running takes effect at its next run.
    fn kick(&self);
}

/// An engine. It owns the registers; its caller owns RAM, devices and time.
pub trait Vcpu: Send {
    /// Runs the guest to its next exit. First drops what the engine has derived from the pages in [`Ram::take_changed`].
    fn run(&mut self, ram: &mut Ram, limit: &Limit) -> Result<Exit, VcpuError>;

    /// Answers the last exit with the value read (ignored for writes). `Some`: the next access of the same instruction.
    /// `None`: run on, or call [`Vcpu::finish_instruction`] to get to an instruction boundary.
    fn complete(&mut self, ram: &mut Ram, value: u64) -> Result<Option<Exit>, VcpuError>;

    /// Finishes the instruction after [`Vcpu::complete`], which may leave that to the next run. `None`: the guest is at an
    /// instruction boundary. `Some`: the next access of the same instruction.
    fn finish_instruction(&mut self, _ram: &mut Ram) -> Result<Option<Exit>, VcpuError> {
        Ok(None)
    }

    /// The guest's position.
    fn position(&self) -> Position;

    /// Delivers an external interrupt before the next instruction. Only after [`Exit::InterruptWindow`].
    fn inject(&mut self, vector: u8) -> Result<(), VcpuError>;

    /// Saves the state. To be called at an instruction boundary.
    fn save(&self) -> Result<VcpuState, VcpuError>;

    /// Restores a saved state, position included, and drops all that was derived from RAM.
    fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError>;

    /// Puts the CPU at the start of a boot. The position goes on counting.
    fn reset(&mut self, start: &Start) -> Result<(), VcpuError>;

    /// A handle that stops the CPU from other threads.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Reports to `ram` all pages that the guest has written since the last call.
    fn report_written(&mut self, ram: &mut Ram) -> Result<(), VcpuError>;

    /// Changes registers. To be called at an instruction boundary.
    fn change_registers(&mut self, change: &mut dyn FnMut(&mut GeneralRegisters)) -> Result<(), VcpuError>;

    /// Takes the check words of the synchronous exits since the last call, one for each, where exits are positions. Equal
    /// guests have equal words.
    fn take_exit_checks(&mut self) -> Vec<u16> {
        Vec::new()
    }

    /// What its user should be told about this vCPU, once.
    fn warning(&self) -> Option<&VcpuWarning> {
        None
    }

    /// Statistics of landings, for engines that count branches.
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
    /// The host's CPU through KVM; positions are synchronous exits.
    KvmSync,
    /// The same with a position at each instruction: for tests, thousands of times slower.
    KvmStep,
    /// The host's CPU through KVM; positions are branches, counted by the CPU's counter.
    KvmCounter,
    /// The same with a counter that is simulated by single steps: for tests.
    KvmStepCounter,
    /// The software CPU with a simulated branch counter: for tests.
    SoftCounter,
    /// The software CPU without translated code: slower, and otherwise the same to the last bit.
    Interpreter,
}

impl Engine {
    /// All engines.
    pub const ALL: [Engine; 7] = [
        Engine::Soft,
        Engine::KvmSync,
        Engine::KvmStep,
        Engine::KvmCounter,
        Engine::KvmStepCounter,
        Engine::SoftCounter,
        Engine::Interpreter,
    ];

    /// Its name in a log's identity. Engines that can rebuild each other's machines have the same name.
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

    /// The engine with this name.
    pub fn named(name: &str) -> Option<Engine> {
        Engine::ALL.into_iter().find(|engine| engine.name() == name)
    }

    /// What the engine's positions count.
    pub fn unit(self) -> PositionUnit {
        match self {
            Engine::Soft | Engine::Interpreter => PositionUnit::Instructions,
            Engine::KvmSync => PositionUnit::SynchronousExits,
            Engine::KvmStep => PositionUnit::Steps,
            Engine::KvmCounter | Engine::KvmStepCounter | Engine::SoftCounter => PositionUnit::Branches,
        }
    }

    /// Whether the host's CPU executes the guest. It cannot trap every instruction that reads the time or random numbers.
    pub fn is_kvm(self) -> bool {
        !matches!(self, Engine::Soft | Engine::Interpreter | Engine::SoftCounter)
    }

    /// Takes from the host now what this many machines at the same time need, for a process that may not take it later: the
    /// software CPU's memory for translated code.
    ///
    /// # Errors
    /// The host refuses it. The machines work without, but more slowly.
    pub fn reserve(self, machines: usize) -> std::io::Result<()> {
        match self {
            Engine::Soft => SoftVcpu::reserve(machines),
            _ => Ok(()),
        }
    }

    /// Makes a vCPU for `ram`.
    pub fn vcpu(self, ram: &Ram) -> Result<Box<dyn Vcpu>, VcpuError> {
        match self {
            Engine::Soft => Ok(Box::new(SoftVcpu::translating(ram.len()))),
            Engine::Interpreter => Ok(Box::new(SoftVcpu::new(ram.len()))),
            Engine::KvmSync => Ok(Box::new(KvmVcpu::new(ram, KvmPositions::Exits)?)),
            Engine::KvmStep => Ok(Box::new(KvmVcpu::new(ram, KvmPositions::Steps)?)),
            Engine::KvmCounter => kvm::counting_vcpu(ram),
            Engine::KvmStepCounter => kvm::step_counting_vcpu(ram),
            Engine::SoftCounter => Ok(Box::new(SimulatedVcpu::for_tests(ram.len()))),
        }
    }
}
