//! Which engine runs the guest: the user's wish, and what this host can do.

use std::path::Path;

use clap::ValueEnum;
use serde::Deserialize;
use vmm::Engine;

use crate::error::Error;

/// Which CPU executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cpu {
    /// The best that this host can run deterministically.
    #[default]
    Auto,
    /// The software CPU: any x86-64 host.
    Soft,
    /// The host's own, through /dev/kvm.
    Kvm,
}

/// What a position counts on KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// The best that this host has.
    #[default]
    Auto,
    /// Hardware counters.
    Counter,
    /// The guest's synchronous exits.
    Sync,
    /// Single steps: for tests.
    Step,
}

/// Chooses, and says what and why in a line.
///
/// # Errors
/// What is asked for cannot be had here.
pub fn choose(cpu: Cpu, positions: Positions) -> Result<Engine, Error> {
    let (engine, why) = match (cpu, positions) {
        (Cpu::Auto, Positions::Auto) => (Engine::Soft, no_counter()),
        (Cpu::Soft, Positions::Auto) => (Engine::Soft, "as asked for"),
        (Cpu::Auto | Cpu::Soft, _) => {
            return Err(Error::config("positions", "they are a choice of --cpu kvm only"));
        }
        (Cpu::Kvm, Positions::Auto) => (Engine::KvmSync, no_counter()),
        (Cpu::Kvm, Positions::Sync) => (Engine::KvmSync, "as asked for"),
        (Cpu::Kvm, Positions::Step) => (Engine::KvmStep, "as asked for"),
        (Cpu::Kvm, Positions::Counter) => return Err(Error::config("positions", no_counter())),
    };
    eprintln!("engine: {} ({why})", engine.name());
    Ok(engine)
}

/// Why KVM cannot land by a counter here.
fn no_counter() -> &'static str {
    let perf = Path::new("/sys/bus/event_source/devices");
    if !Path::new("/dev/kvm").exists() {
        "this host has no /dev/kvm"
    } else if !["cpu", "cpu_core"].iter().any(|unit| perf.join(unit).exists()) {
        "this host has no hardware counter that KVM could land by"
    } else {
        "this vmft does not land by hardware counters yet"
    }
}
