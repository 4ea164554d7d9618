//! Privileged behaviour: paging and the TLB, exceptions, far transfers, debugging, ports, code that changes,
//! and stopping at every instruction. Small guest programs whose outcomes are those of the SDM.

#[path = "../guest/mod.rs"]
mod guest;

mod code;
mod debug;
mod device;
mod exceptions;
mod io;
mod paging;
mod random;
mod registers;
mod segments;
mod stops;
mod tlb;
mod transfers;
