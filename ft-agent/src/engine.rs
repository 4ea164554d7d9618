//! Which engine runs the guest: the user's wish, and what this host can do.

use clap::ValueEnum;
use serde::Deserialize;
use vmm::Engine;

use crate::doctor;
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
    /// The same without translated code: slower, and otherwise the same to the last bit.
    Interpreter,
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
    let asked = "as asked for".to_owned();
    let (engine, why) = match (cpu, positions) {
        (Cpu::Auto, Positions::Auto) => match doctor::exact() {
            Ok(why) => (Engine::KvmCounter, why),
            Err(why) => (Engine::Soft, format!("KVM would not be exact here: {why}")),
        },
        (Cpu::Soft, Positions::Auto) => (Engine::Soft, asked),
        (Cpu::Soft, Positions::Counter) => (Engine::SoftCounter, "a simulated counter, for tests".into()),
        (Cpu::Interpreter, Positions::Auto) => {
            (Engine::Interpreter, "the software CPU without translated code, as asked for".into())
        }
        (Cpu::Auto | Cpu::Soft | Cpu::Interpreter, _) => {
            return Err(Error::config("positions", "they are a choice of --cpu kvm only"));
        }
        (Cpu::Kvm, Positions::Auto) => match doctor::exact() {
            Ok(why) => (Engine::KvmCounter, why),
            Err(why) => (Engine::KvmSync, format!("no exact counter here: {why}")),
        },
        (Cpu::Kvm, Positions::Sync) => (Engine::KvmSync, asked),
        (Cpu::Kvm, Positions::Step) => (Engine::KvmStep, asked),
        (Cpu::Kvm, Positions::Counter) => match doctor::exact() {
            Ok(why) => (Engine::KvmCounter, why),
            Err(why) => return Err(Error::config("positions", format!("no exact counter here: {why}"))),
        },
    };
    eprintln!("engine: {} ({why})", engine.name());
    Ok(engine)
}
