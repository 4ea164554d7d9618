//! How faults are injected.

use agent::{Event, Hello, Role, Rule};
use entry::PositionUnit;
use entry::identity::Identity;
use logging_channel::versions::OURS;
use store_rule::names::Incarnation;
use store_rule::record::{Command, Member, Members};

use super::MS;
use super::faults::Fault;
use super::guest::POWER_OFF;
use super::process::TIMING;
use super::sim_event::{SimEvent, SimResult};
use super::world::{RevokedBy, World};

/// How long an old pair's outputs may still leave after a start elsewhere, and after the last fault: the time
/// of a look, and of some looks whose answers get lost.
const TWO_COPIES_MAX: u64 = 300 * MS;

impl World {
    pub fn inject(&mut self, fault: Fault) -> SimResult {
        self.trace(0, &fault);
        let until = self.now + fault.lasts_ns();
        match fault {
            Fault::Kill { host } => self.kill(host),
            Fault::PowerLoss { host } => self.lose_power(host),
            Fault::KillAtEffect { host, effects } => {
                if let Some(process) = &mut self.hosts[host].process {
                    process.kill_in = Some(effects);
                }
            }
            Fault::Pause { host, ns } => self.pause(host, ns),
            Fault::PauseAtEffect { host, effects, ns } => {
                if let Some(process) = &mut self.hosts[host].process {
                    process.pause_in = Some((effects, ns));
                }
            }
            Fault::Restart { host, after_ns } => {
                self.kill(host);
                self.schedule_after(after_ns, SimEvent::Spawn { host });
            }
            Fault::Cut { to, .. } => {
                for host in (0..2).filter(|h| to[*h]) {
                    self.cut_until[host] = self.cut_until[host].max(until);
                }
            }
            Fault::Reset { told } => self.reset(told),
            Fault::CutStore { host, .. } => self.store_cut_until[host] = until,
            Fault::NoQuorum { .. } => self.no_quorum_until = until,
            Fault::ClockJump { host, ns } => self.hosts[host].ahead_ns += ns,
            Fault::Wedge { host, .. } => self.hosts[host].wedged_until = until,
            Fault::SlowReplay { .. } => self.slow_until = until,
            Fault::Diverge => {
                if let Some(process) = &mut self.hosts[1].process
                    && !process.is_live(1)
                {
                    process.guest.hash ^= 1;
                }
            }
            Fault::DiskFails { host } => return self.handle_event(host, Event::HostFailed("its disk")),
            Fault::PowerOff => self.ask_guest(POWER_OFF),
            Fault::HandOver { host } => return self.handle_event(host, Event::HandOver),
            Fault::Flood { .. } => self.flood_until = until,
            Fault::Stranger { host, same_certificate } => {
                return self.send_stranger(host, same_certificate, fault);
            }
            Fault::Elsewhere => self.start_elsewhere(),
            Fault::Revoke { host, revoked } => return self.revoke(host, revoked),
            Fault::StoreDown { leader, .. } => self.store.stop_member(leader, until),
            Fault::StoreRollBack { leader, changes } => {
                let is_old = self.store.roll_back_member(leader, changes, self.now);
                self.checker.counts.rolled_back += is_old as u64;
            }
        }
        Ok(())
    }

    /// The operator forgets the VM and starts it on a third host. Without a quorum the operator tries again.
    fn start_elsewhere(&mut self) {
        let unanswered = self.now < self.no_quorum_until || self.forget_and_open() == Some(false);
        if unanswered && !self.guest_is_off {
            self.schedule_after(5 * MS, SimEvent::Fault(Fault::Elsewhere));
        }
    }

    /// Whether the third host runs the VM; `None`: the store knows no VM that the operator could forget.
    fn forget_and_open(&mut self) -> Option<bool> {
        let generation = self.store.answered().get(&self.vm)?.generation;
        if self.elsewhere_since.is_some() || self.guest_is_off {
            return None;
        }
        let who = Incarnation::try_from(1 << 70).expect("not zero");
        let members = Members { primary: Member::new(who), backup: None };
        let next = generation.next().expect("a generation");
        let forget = Command::Forget { generation };
        let open = Command::Open { generation: next, members };
        for command in [forget, open, Command::Take { generation: next, who }] {
            if self.store.change(self.now, &self.vm, command).is_none() {
                return Some(false);
            }
        }
        self.checker.counts.started_elsewhere += 1;
        self.elsewhere_since = Some(self.now);
        self.quiet = self.quiet.max(self.now);
        Some(true)
    }

    /// Outputs of the old pair come only for a bounded time after a start elsewhere.
    pub fn check_copies(&self, host: usize) -> SimResult {
        let Some(since) = self.elsewhere_since else { return Ok(()) };
        // A host that was alone and whose key was then revoked is not told by the store that it is forgotten.
        if self.now > since.max(self.quiet) + TWO_COPIES_MAX && !self.revoked[host].store {
            return Err(format!("two copies of the VM run since {} us", since / 1000));
        }
        Ok(())
    }

    /// A host's key is removed at its peer, which closes the connection, or at the store.
    fn revoke(&mut self, host: usize, revoked: RevokedBy) -> SimResult {
        let peer = 1 - host;
        if self.hosts[peer].paused_until > self.now {
            let at = self.hosts[peer].paused_until + self.rng.between(1, MS / 2);
            self.schedule_at(at, SimEvent::Fault(Fault::Revoke { host, revoked }));
            return Ok(());
        }
        self.checker.counts.revoked += 1;
        self.revoked[host].peer |= revoked.peer;
        self.revoked[host].store |= revoked.store;
        let is_open = self.connection.as_ref().is_some_and(|(_, c)| c.open[peer]);
        if !self.refuses_key_of(host) || !is_open {
            return Ok(());
        }
        self.close(peer);
        self.handle_event(peer, Event::Disconnected)
    }

    /// Whether a host's peer refuses its key.
    pub fn refuses_key_of(&self, host: usize) -> bool {
        self.revoked[host].peer && self.without != Some(Rule::RefuseRevokedKeys)
    }

    /// A hello that a stopped process finds when it goes on.
    fn send_stranger(&mut self, host: usize, same_certificate: bool, fault: Fault) -> SimResult {
        let paused_until = self.hosts[host].paused_until;
        if paused_until > self.now {
            let at = paused_until + self.rng.between(1, MS / 2);
            self.schedule_at(at, SimEvent::Fault(fault));
            return Ok(());
        }
        let role = if host == 0 { Role::Backup } else { Role::Primary };
        let hello = Hello {
            versions: OURS,
            vm: self.vm.as_str().into(),
            role,
            incarnation: u128::from(self.rng.next()) | 1 << 64,
            disks: Default::default(),
            timeout_ns: TIMING.timeout_ns,
            buffer_bytes: 1 << 16,
            identity: Identity::new(PositionUnit::Instructions).field("guest", "simulated"),
        };
        self.claim(host, &hello, same_certificate)
    }

    pub fn kill(&mut self, host: usize) {
        self.trace(host, &"killed");
        self.hosts[host].process = None;
        self.hosts[host].is_lost = true;
        self.hosts[host].paused_until = 0;
        self.close(host);
    }

    pub fn lose_power(&mut self, host: usize) {
        self.trace(host, &"lost its power");
        self.hosts[host].process = None;
        self.hosts[host].is_lost = true;
        if let Some((_, connection)) = &mut self.connection {
            connection.open[host] = false;
            let keep = self.rng.between(0, 3) as usize;
            connection.lose(1 - host, keep);
        }
    }

    pub fn pause(&mut self, host: usize, ns: u64) {
        let until = self.now + ns;
        let h = &mut self.hosts[host];
        h.paused_until = h.paused_until.max(until);
        if let Some(process) = &h.process {
            let (at, id) = (h.paused_until, process.id);
            self.trace(host, &"paused");
            self.schedule_at(at, SimEvent::Resume { host, id });
        }
    }
}
