//! The client: it sends requests to both hosts, and expects answers.

use super::MS;
use super::guest::{GuestOutput, POWER_OFF, request};
use super::sim_event::{SimEvent, SimResult};
use super::world::World;

impl World {
    /// The client sends a request to both hosts.
    pub fn ask_guest(&mut self, number: u64) {
        let flooding = self.now < self.flood_until;
        for host in 0..2 {
            let filler = if flooding { self.rng.between(0, 1400) as usize } else { 0 };
            if !self.rng.chance(50) {
                self.schedule_between(MS / 10, 2 * MS, SimEvent::Request { host, number, filler });
            }
            if self.rng.chance(30) {
                self.schedule_between(MS / 10, 4 * MS, SimEvent::Request { host, number, filler });
            }
        }
    }

    pub fn deliver_request(&mut self, host: usize, number: u64, filler: usize) {
        let Some(process) = &mut self.hosts[host].process else { return };
        if process.is_live(host) && process.inputs.len() < 32 {
            process.inputs.push_back(request(number, filler));
        }
    }

    /// An output is on its way to the client.
    pub fn send_to_client(&mut self, said: GuestOutput) {
        if said.answers != 0 && !self.rng.chance(50) {
            self.schedule_between(MS / 10, 2 * MS, SimEvent::Reply(said));
        }
    }

    pub fn replied(&mut self, said: GuestOutput) -> SimResult {
        if said.answers > self.asked && said.answers != POWER_OFF {
            return Err(format!("{said:?} answers a request that was never sent"));
        }
        if said.answers == self.asked {
            self.asked += 1;
            self.ask_guest(self.asked);
        }
        Ok(())
    }
}
