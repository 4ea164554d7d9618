//! Which side of a pair may live: the agent of a replica, a function of events and time.
//!
//! ```text
//! primary: Waiting ─hello─> Measuring ─> Opening ─opened─> Protected ─> HandingOver, Ending
//!          HandingOver ─backup ready─> Yielded ─backup lives, or is lost─> Out;  ─not in time─> Protected
//! backup:  Waiting ─hello─> Met ───start────> Protected ─> Ending;  Protected ─primary yields─> Alone
//!          Protected ─told to take, in version 3─> ReceivingHandover
//!          Protected and what follows it ─peer lost─> Suspecting ─able to live─> Taking ─won─> Alone
//!                                                                                  └─lost─> Out: fenced
//!          Protected, Alone ─the store says: forgotten, opened again, or held by the other─> Out
//! ```
//!
//! [`Agent::handle`] takes an [`Event`] and leaves [`Action`]s and bytes to write. The agent's owner moves
//! bytes, time and verdicts, does the actions in their order, and nothing else:
//!
//! - **One mutex** protects it, in short sections. The guest's thread appends its records ([`Agent::append`])
//!   and writes [`Agent::outgoing`] to the socket at once; the thread that reads the socket passes on what it
//!   read.
//! - **The gate** lets an output out while `gate.released() < agent.release_limit(now)`, asked again for each
//!   output just before it is written, and reports it to [`Agent::released`].
//! - **Time** is a monotonic clock in ns that goes on while the host sleeps (`CLOCK_BOOTTIME`).
//!   [`Event::Tick`] comes when there was nothing to read from the socket, at [`Agent::deadline`] at the
//!   latest.
//! - **The guest loop** calls [`Agent::guest_loop_turned`] in each iteration, which is called a turn here,
//!   even if it only waits, and runs as fast as [`Agent::pace`] allows.
//!
//! The code refers to these rules by their numbers:
//!
//! 1. A holder is an incarnation: a random id that is created with the machine's state. A changed incarnation
//!    in the peer's hello means that the peer is lost; rule 10 says whose hello that is.
//! 2. The loss of the peer is a suspicion. Its causes are silence, judged after the sockets are drained; a
//!    connection that ended; and no progress while work is pending.
//! 3. A suspicion is one-way. It closes the channel before `take` is sent. Only a verdict ends it; while the
//!    verdict is unknown the store is asked again.
//! 4. A replica that takes must be able to live: a backup has replayed everything it acknowledged, with equal
//!    digests, and its tap and disk are ready. A replica that failed says so and never takes.
//! 5. A loser may have emitted only outputs that were acknowledged before the survivor's receiver closed. The
//!    gate releases nothing when this side's own last turn, or the last time at which the peer is known to
//!    have heard from this side, is older than half the timeout: the two are a lease. After a verdict of Won,
//!    the outputs left in the gate leave in order.
//! 6. The store's verdict is for one generation and one incarnation.
//! 7. No instruction runs before the identities match and the generation is open.
//! 8. The VM's end is acknowledged before the primary exits, and the backup then exits without taking. A
//!    planned handover loses nothing. A VM that was stopped for good is never revived.
//! 9. At go-live, unfinished disk requests are issued again and the outputs left in the gate are sent.
//! 10. A claim never beats a live connection. The hello of another process means that the peer is lost only if
//!     that process has the very certificate of the peer's connection, and nothing was heard on that connection
//!     for half the timeout. A peer that was restarted is noticed anyway: its old connection ends or is silent.
//! 11. A running side watches the store: it looks at the VM's record at intervals, and soon again after a look
//!     without an answer. One that finds its VM forgotten, opened again without it, or held by the other side
//!     never emits an output again, and says why. While the store does not answer, or has lost its record of the
//!     pair, the guest goes on, but it is not protected: a verdict would not come, or would let neither side live.
//! 12. A pair is called protected only while the loss of either side would be survived at once and the guest's
//!     outputs leave. It is at risk while confirmations come too late for the lease, while the backup is further
//!     behind than it may be, and while the store does not answer a side, of which beats tell the other. A link with
//!     which no output could leave is refused before the guest runs. At its limit the lag stops the guest, or makes
//!     the backup count as lost.
//! 13. A primary that hands over can go back until it yields; that it does only when all outputs have left and the
//!     backup has replayed everything, with equal digests. One that has yielded never takes and never emits again,
//!     whatever happens: so its backup lives without a verdict, and tells the store as soon as it answers. A backup
//!     that is asked to prepare does not leave while its primary may yield.
#![forbid(unsafe_code)]

#[cfg(feature = "ablation")]
mod ablation;
mod agent;
mod config;
mod end;
mod event;
mod failover;
mod failure_detector;
mod handover;
mod look;
mod protection;
mod risks;
mod rules;
mod start;
mod state;
mod status;
mod watch;

pub use agent::Agent;
pub use config::{Buffers, Config, LagLimitAction, PairTiming};
pub use event::{Action, Event, Outcome, PeerRefusal, Suspicion};
pub use logging_channel::message::{Hello, KeyProof, Role};
pub use logging_channel::receiver::NextRecord;
pub use logging_channel::sender::{Cursors, GuestPace};
pub use protection::{Exposure, Protection, Risk};
#[cfg(feature = "ablation")]
pub use rules::Rule;
pub use status::{Phase, Status};
pub use watch::{StoreProblem, StoreView};
