//! Who may live: the agent of a replica, a function of events and time.
//!
//! ```text
//! primary: Waiting ─hello─> Opening ─opened─> Protected ─> HandingOver, Ending
//! backup:  Waiting ─hello─> Met ───start────> Protected ─> Succeeding, Ending
//!          Protected and what follows it ─peer lost─> Suspecting ─able to live─> Taking ─won─> Alone
//!                                                                                  └─lost─> Out: fenced
//! ```
//!
//! [`Agent::handle`] takes an [`Event`] and leaves [`Action`]s and bytes to write. Whoever owns it moves bytes, time and
//! verdicts, does the actions in their order, and nothing else:
//!
//! - **One mutex** around it, with short sections. The guest's thread appends its records ([`Agent::append`]) and writes
//!   [`Agent::outgoing`] to the socket at once; the thread that reads the socket passes on what it read.
//! - **The gate** lets an output out while `gate.released() < agent.release_limit(now)`, asked anew for each output just
//!   before it is written, and says so to [`Agent::released`].
//! - **Time** is a monotonic clock in ns that goes on while the host sleeps (`CLOCK_BOOTTIME`). [`Event::Tick`] comes when
//!   there was nothing to read from the socket, at [`Agent::deadline`] at the latest.
//! - **The guest's loop** calls [`Agent::turn`] at each of its turns, also when it only waits, and runs as fast as
//!   [`Agent::pace`] allows.
//!
//! The rules that are named in the code are these:
//!
//! 1. A holder is an incarnation: a random id born with the machine's state. A changed one in a hello means peer lost.
//! 2. Peer lost is a suspicion: silence, judged after the sockets are drained; a connection that ended; or no progress
//!    while work is pending.
//! 3. Suspicion is one-way. It closes the channel before `take` is sent. Only a verdict ends it; an unknown one is asked
//!    for again.
//! 4. Who takes must be able to live: a backup replays everything it acknowledged, with equal digests, and has its tap
//!    and disk ready. One that failed says so and never takes.
//! 5. A loser may have emitted only outputs that were acknowledged before the survivor's receiver closed. The gate
//!    releases nothing when the own last turn, or the time from which the peer is known to have heard, is older than half
//!    the timeout. On Won the held tail leaves in order.
//! 6. The store's verdict is for one generation and one incarnation.
//! 7. No instruction runs before the identities match and the generation is open.
//! 8. An end is acknowledged before the primary exits, and the backup then exits without taking. A planned handover
//!    loses nothing. Who is stopped for good is never revived.
//! 9. At go-live unfinished disk requests are issued again and the gate's tail is sent.
#![forbid(unsafe_code)]

mod agent;
mod config;
mod end;
mod event;
mod start;
mod status;
mod survive;
mod watch;

pub use agent::Agent;
pub use config::{Buffers, Config, Rule, Timing};
pub use event::{Action, Event, Exit, Opened, Refusal, Suspicion, Verdict};
pub use logging_channel::message::{Hello, Role};
pub use logging_channel::receiver::NextRecord;
pub use logging_channel::sender::{Cursors, Pace};
pub use status::{Phase, Status};
