//! A deterministic x86-64 CPU in safe Rust.
//!
//! The CPU is a pure state machine: `state + RAM + replies -> next state`. It does no I/O, reads no clock and
//! calls nobody; [`SoftCpu::run`] returns an [`Exit`] that says what the guest asked for.
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
//! # Layout
//!
//! [`state`] and [`flags`] hold registers; [`memory`], [`tlb`] and [`paging`] are the way to RAM; [`decode`]
//! turns guest bytes into [`insn::Insn`]s, [`code`] caches them by physical page, [`run`] executes them.
//! [`exec`] has one function for each instruction form, [`exception`] delivers faults and interrupts.
//! A translating tier would replace [`run`] and use the same state, memory and decoder.
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
pub mod memory;
pub mod paging;
pub mod run;
pub mod segment;
pub mod state;
pub mod tlb;

pub use exit::{Exit, Fault, Stop};
pub use run::{RunLimit, SoftCpu};
pub use state::{Cpu, CpuState};
