//! Faults, and when they happen.

use super::MS;
use super::rng::Rng;
use super::world::RevokedBy;

/// Something that goes wrong in a host (0: primary, 1: backup) or between the hosts.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// `kill -9`: the kernel closes its connections.
    Kill { host: usize },
    /// The host loses its power: its peer is not notified.
    PowerLoss { host: usize },
    /// It dies just before its n-th next effect on the world: a write to the socket or the tap, a question to
    /// the store.
    KillAtEffect { host: usize, effects: u64 },
    /// Like SIGSTOP: time passes, and its sockets fill.
    Pause { host: usize, ns: u64 },
    /// It is stopped just before its n-th next effect, for instance between the gate's decision and the
    /// write.
    PauseAtEffect { host: usize, effects: u64, ns: u64 },
    /// It is killed, and started again by a supervisor.
    Restart { host: usize, after_ns: u64 },
    /// Bytes to these hosts wait.
    Cut { to: [bool; 2], ns: u64 },
    /// The connection is gone, and the hosts that are `told` learn of it.
    Reset { told: [bool; 2] },
    /// A host does not reach the store.
    CutStore { host: usize, ns: u64 },
    /// The store has no quorum.
    NoQuorum { ns: u64 },
    /// A host's clock jumps forward.
    ClockJump { host: usize, ns: u64 },
    /// The guest loop stands still, while the rest of the process lives.
    Wedge { host: usize, ns: u64 },
    /// The replay is slow.
    SlowReplay { ns: u64 },
    /// A bit flips in the backup's guest.
    Diverge,
    /// A disk fails.
    DiskFails { host: usize },
    /// The guest is asked to switch itself off.
    PowerOff,
    /// Not a fault but planned: a primary hands over, a backup leaves.
    HandOver { host: usize },
    /// The client sends as fast as it can.
    Flood { ns: u64 },
    /// A process that is not the host's peer says hello to it in the peer's name, with the peer's certificate
    /// (it was started twice on the peer's host) or with another one.
    Stranger { host: usize, same_certificate: bool },
    /// The operator has the store forget the VM, and starts it on a third host.
    Elsewhere,
    /// A host's key is revoked: its peer, the store or both accept it no longer.
    Revoke { host: usize, revoked: RevokedBy },
    /// The store's leader, or another member, does not answer.
    StoreDown { leader: bool, ns: u64 },
    /// The store's leader, or another member, comes back with an earlier copy of its directory: this many
    /// changes earlier.
    StoreRollBack { leader: bool, changes: usize },
}

/// A fault and when it happens.
pub type PlannedFault = (u64, Fault);

/// Chooses the faults of a run.
pub fn plan_faults(rng: &mut Rng) -> Vec<PlannedFault> {
    let from = if rng.chance(150) { 0 } else { 15 * MS };
    let mut faults: Vec<PlannedFault> = Vec::new();
    for _ in 0..rng.between(0, 4) {
        let at = rng.between(from, 200 * MS);
        let fault = fault(rng);
        faults.push((at, fault));
        // Much goes wrong only when two faults happen together.
        if rng.chance(400) {
            faults.push((at + rng.between(0, 30 * MS), self::fault(rng)));
        }
    }
    if rng.chance(40) {
        // The peer is suspected just before the log flows again, and the verdict takes long.
        let at = rng.between(from, 200 * MS);
        let to = [[false, true], [true, false]][(rng.next() & 1) as usize];
        faults.push((at, Fault::Cut { to, ns: rng.between(40 * MS, 60 * MS) }));
        faults.push((at + 35 * MS, Fault::NoQuorum { ns: rng.between(10 * MS, 80 * MS) }));
    }
    if rng.chance(30) {
        let at = rng.between(from, 200 * MS);
        let after_ns = rng.between(0, 10 * MS);
        faults.extend([0, 1].map(|host| (at, Fault::Restart { host, after_ns })));
    }
    if rng.chance(40) {
        // One side wins; then the member that was away when it did, and one that has gone back to before it, are
        // left alone with the other side's question.
        let at = rng.between(from, 200 * MS);
        let host = (rng.next() & 1) as usize;
        faults.push((at, Fault::Cut { to: [true; 2], ns: 150 * MS }));
        faults.push((at, Fault::CutStore { host, ns: rng.between(75 * MS, 100 * MS) }));
        faults.push((at + 20 * MS, Fault::StoreDown { leader: false, ns: 45 * MS }));
        faults.push((
            at + 66 * MS,
            Fault::StoreRollBack { leader: false, changes: rng.between(1, 3) as usize },
        ));
        faults.push((at + 67 * MS, Fault::StoreDown { leader: true, ns: rng.between(10 * MS, 80 * MS) }));
    }
    if rng.chance(80) {
        // A handover, and in the middle of it something else.
        let at = rng.between(15 * MS, 200 * MS);
        faults.push((at, Fault::HandOver { host: 0 }));
        let ns = rng.between(10 * MS, 150 * MS);
        let disturbance = match rng.between(0, 7) {
            0 => Fault::Kill { host: 1 },
            1 => Fault::HandOver { host: 1 },
            2 => Fault::NoQuorum { ns },
            3 => Fault::Cut { to: [true; 2], ns },
            4 => Fault::Cut { to: [false, true], ns },
            5 => Fault::Pause { host: 1, ns },
            6 => Fault::SlowReplay { ns },
            _ => self::fault(rng),
        };
        let then = at + rng.between(0, 12 * MS);
        faults.push((then, disturbance));
        if rng.chance(300) {
            // The backup lives, but neither its primary nor the store is told.
            faults.push((then, Fault::Cut { to: [true, false], ns: 100 * MS }));
            faults.push((at, Fault::CutStore { host: 1, ns: 150 * MS }));
        }
    }
    if rng.chance(30) {
        faults.push((rng.between(15 * MS, 250 * MS), Fault::Elsewhere));
    }
    faults
}

fn fault(rng: &mut Rng) -> Fault {
    let host = (rng.next() & 1) as usize;
    let effects = rng.between(1, 40);
    let either = [[true, false], [false, true], [true, true], [true, true]][rng.between(0, 3) as usize];
    match rng.between(0, 32) {
        0 | 1 => Fault::Kill { host },
        2 => Fault::PowerLoss { host },
        3 => Fault::KillAtEffect { host, effects },
        4 | 5 => Fault::Pause { host, ns: rng.between(MS, 120 * MS) },
        6 | 7 => Fault::PauseAtEffect { host, effects, ns: rng.between(MS, 120 * MS) },
        8 => Fault::Restart { host, after_ns: rng.between(0, 20 * MS) },
        9..=11 => Fault::Cut { to: either, ns: rng.between(MS, 150 * MS) },
        12 => Fault::Reset { told: either },
        13 => Fault::CutStore { host, ns: rng.between(MS, 200 * MS) },
        14 => Fault::NoQuorum { ns: rng.between(MS, 200 * MS) },
        15 => Fault::ClockJump { host, ns: rng.between(MS, 120 * MS) },
        16 | 17 => Fault::Wedge { host, ns: rng.between(10 * MS, 300 * MS) },
        18 => Fault::SlowReplay { ns: rng.between(10 * MS, 150 * MS) },
        19 => Fault::Diverge,
        20 => Fault::DiskFails { host },
        21 => Fault::PowerOff,
        22 => Fault::HandOver { host },
        23..=25 => Fault::Stranger { host, same_certificate: rng.chance(500) },
        26 | 27 => {
            let (peer, store) = [(true, false), (false, true), (true, true)][rng.between(0, 2) as usize];
            Fault::Revoke { host, revoked: RevokedBy { peer, store } }
        }
        28 | 29 => Fault::StoreDown { leader: rng.chance(500), ns: rng.between(MS, 100 * MS) },
        30 => Fault::StoreRollBack { leader: rng.chance(500), changes: rng.between(1, 3) as usize },
        _ => Fault::Flood { ns: rng.between(5 * MS, 60 * MS) },
    }
}

impl Fault {
    /// How long it lasts.
    pub fn lasts_ns(self) -> u64 {
        match self {
            Fault::Pause { ns, .. }
            | Fault::PauseAtEffect { ns, .. }
            | Fault::Cut { ns, .. }
            | Fault::CutStore { ns, .. }
            | Fault::NoQuorum { ns }
            | Fault::ClockJump { ns, .. }
            | Fault::Wedge { ns, .. }
            | Fault::SlowReplay { ns }
            | Fault::StoreDown { ns, .. }
            | Fault::Flood { ns } => ns,
            Fault::Restart { after_ns, .. } => after_ns,
            _ => 0,
        }
    }
}
