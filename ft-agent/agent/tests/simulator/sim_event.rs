//! What can happen in a simulation.

use agent::StoreView;
use store_rule::names::{Generation, Incarnation};
use store_rule::record::{Command, CommandReply};

use super::faults::Fault;
use super::guest::GuestOutput;

/// The result of a step of the simulation: an error says which invariant is broken.
pub type SimResult = Result<(), String>;

/// What a process asks the store.
#[derive(Clone, Debug)]
pub enum StoreQuestion {
    Change(Command),
    Look { generation: Generation, who: Incarnation },
}

/// The store's answer.
#[derive(Clone, Debug)]
pub enum StoreAnswer {
    Reply(CommandReply),
    View(StoreView),
}

/// Something that happens at a simulated time.
#[derive(Clone, Debug)]
pub enum SimEvent {
    /// A turn of a process's guest loop.
    Turn { host: usize, id: u64 },
    /// Its timer fires.
    Tick { host: usize, id: u64 },
    /// It reads from its socket.
    Read { host: usize, id: u64 },
    /// It goes on after a pause.
    Resume { host: usize, id: u64 },
    /// It looks for its peer.
    Connect { host: usize, id: u64 },
    /// A packet arrives.
    Arrive { connection: u64, to: usize },
    /// A process sends a question to the store.
    Ask { host: usize, id: u64, question: StoreQuestion },
    /// A question of a host reaches the store; the process `reply_to` waits for the answer.
    Reach { host: usize, question: StoreQuestion, reply_to: Option<u64> },
    /// The store's answer arrives, or the sender gives up waiting for it.
    Answer { host: usize, id: u64, question: StoreQuestion, answer: Option<StoreAnswer> },
    /// A disk request is done.
    DiskDone { host: usize, id: u64, request: u64 },
    /// The client's timer fires.
    Client,
    /// A frame from the client arrives.
    Request { host: usize, number: u64, filler: usize },
    /// A frame arrives at the client.
    Reply(GuestOutput),
    /// Something goes wrong.
    Fault(Fault),
    /// A supervisor starts a process.
    Spawn { host: usize },
}

impl SimEvent {
    /// The process that it happens to: its host and id.
    pub fn process(&self) -> Option<(usize, u64)> {
        match self {
            SimEvent::Turn { host, id }
            | SimEvent::Tick { host, id }
            | SimEvent::Read { host, id }
            | SimEvent::Resume { host, id }
            | SimEvent::Connect { host, id }
            | SimEvent::Answer { host, id, .. }
            | SimEvent::Ask { host, id, .. }
            | SimEvent::DiskDone { host, id, .. } => Some((*host, *id)),
            _ => None,
        }
    }
}
