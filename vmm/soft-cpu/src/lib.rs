//! A deterministic x86-64 CPU in safe Rust.
//!
//! The CPU is a pure state machine: `state + RAM + replies -> next state`. It does no I/O, reads no clock and
//! makes no callbacks; [`SoftCpu::run`] returns an [`CpuExit`] that says what the guest asked for.
//!
//! # What counts as one retired instruction
//!
//! The position of a guest on this engine is the exact count of retired instructions:
//!
//! - an instruction counts one when it completes; `INT n`, `SYSCALL` and `IRET` count like any other;
//! - an instruction that faults does not count, nor does the delivery of a fault or an interrupt;
//! - a `REP` string instruction counts one for each iteration (one if there are none), and interrupts, faults
//!   and [`RunLimit::until`] may stop it between two iterations, with RIP at the instruction as on hardware;
//! - an instruction that leaves the CPU for a port or for memory outside RAM counts when
//!   [`SoftCpu::complete`] has finished it.
//!
//! # Differences from hardware
//!
//! - Only 64-bit mode exists: every instruction that would enter compatibility mode (far transfer, IRET,
//!   SYSRET, SYSEXIT) raises #GP, and CR0.PG and CR4.PAE cannot be cleared. Call gates raise #GP.
//! - Descriptor tables, task segment and the stacks of handlers have to be in RAM; in device memory they
//!   cause a triple fault. Page tables outside RAM read as all ones.
//! - Memory types have no effect. Instructions are not fetched from device memory: the fetch raises #UD.
//! - Data breakpoints do not see the accesses of event delivery; a debug trap of an instruction that loads SS
//!   is lost.
//! - The x87's external error reporting (CR0.NE = 0) does not exist; neither do machine checks and NMIs.
//!
//! # Layout
//!
//! [`state`] and [`flags`] hold registers, [`int`] has the operand widths; [`memory`], [`tlb`] and [`paging`]
//! are the way to RAM; [`decode`] turns guest bytes into [`insn::Insn`]s, [`code`] caches them by physical
//! page, [`run`] executes them. [`exec`] has one function for each instruction form, [`exception`] delivers
//! faults and interrupts through descriptors that [`segment`] reads, [`debug`] has single steps and
//! breakpoints, [`observe`] is for debuggers and simulated counters, which follow a CPU step by step.
//! [`tier`] is the interface to translated code, which the crate `translator` makes.
#![forbid(unsafe_code)]

pub mod code;
pub mod debug;
pub mod decode;
pub mod exception;
pub mod exec;
pub mod exit;
pub mod flags;
pub mod float;
pub mod insn;
pub mod int;
pub mod memory;
pub mod observe;
pub mod paging;
pub mod run;
pub mod segment;
pub mod state;
pub mod tier;
pub mod tlb;

pub use exit::{CpuExit, CpuStop, Exception};
pub use run::{RunLimit, SoftCpu};
pub use state::{Cpu, CpuState};
