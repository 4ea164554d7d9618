//! How faults are injected.

use agent::{Event, Hello, Role};
use entry::PositionUnit;
use entry::identity::Identity;

use super::MS;
use super::faults::Fault;
use super::guest::POWER_OFF;
use super::process::TIMING;
use super::sim_event::{SimEvent, SimResult};
use super::world::World;

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
        }
        Ok(())
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
