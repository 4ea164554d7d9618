//! A deterministic x86-64 CPU.
