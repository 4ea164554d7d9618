//! Chooses the engine that runs the guest, from the user's options and what this host can do.

use clap::ValueEnum;
use serde::Deserialize;
use tracing::info;
use vmm::Engine;

use crate::doctor;
use crate::error::Error;

/// The CPU that executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuChoice {
    /// The host's CPU if this host can run it deterministically, otherwise the software CPU.
    #[default]
    Auto,
    /// The software CPU, which runs on any x86-64 host.
    Soft,
    /// The software CPU without translated code: slower, with the same result to the last bit.
    Interpreter,
    /// The host's CPU, through /dev/kvm.
    Kvm,
}

/// What positions count with `--cpu kvm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PositionsChoice {
    /// Hardware counters if they are exact on this host, otherwise the guest's synchronous exits.
    #[default]
    Auto,
    /// Conditional branches, by a hardware counter.
    Counter,
    /// The guest's synchronous exits.
    Sync,
    /// Single steps, for tests.
    Step,
}

/// Chooses the engine, and prints a line that names it and the reason.
///
/// # Errors
/// The engine that was asked for is not available on this host, or the options contradict each other.
pub fn choose(cpu: CpuChoice, positions: PositionsChoice) -> Result<Engine, Error> {
    let asked = "as asked for".to_owned();
    let (engine, why) = match (cpu, positions) {
        (CpuChoice::Auto, PositionsChoice::Auto) => match doctor::check_exact_positions() {
            Ok(why) => (Engine::KvmCounter, why),
            Err(why) => (Engine::Soft, format!("KVM is not exact on this host: {why}")),
        },
        (CpuChoice::Soft, PositionsChoice::Auto) => (Engine::Soft, asked),
        (CpuChoice::Soft, PositionsChoice::Counter) => {
            (Engine::SoftCounter, "a simulated counter, for tests".into())
        }
        (CpuChoice::Interpreter, PositionsChoice::Auto) => {
            (Engine::Interpreter, "the software CPU without translated code, as asked for".into())
        }
        (CpuChoice::Auto | CpuChoice::Soft | CpuChoice::Interpreter, _) => {
            return Err(Error::config(
                "positions",
                "--positions needs --cpu kvm; leave it out, or give --cpu kvm as well",
            ));
        }
        (CpuChoice::Kvm, PositionsChoice::Auto) => match doctor::check_exact_positions() {
            Ok(why) => (Engine::KvmCounter, why),
            Err(why) => (Engine::KvmSync, format!("this host has no exact counter: {why}")),
        },
        (CpuChoice::Kvm, PositionsChoice::Sync) => (Engine::KvmSync, asked),
        (CpuChoice::Kvm, PositionsChoice::Step) => (Engine::KvmStep, asked),
        (CpuChoice::Kvm, PositionsChoice::Counter) => match doctor::check_exact_positions() {
            Ok(why) => (Engine::KvmCounter, why),
            Err(why) => {
                let why =
                    format!("this host has no exact counter: {why}; give --positions sync, or --cpu soft");
                return Err(Error::config("positions", why));
            }
        },
    };
    info!("engine: {} ({why})", engine.name());
    Ok(engine)
}
