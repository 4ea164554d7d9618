//! The connection between the hosts: how it comes up, what arrives, and how it ends.

use agent::{Event, Phase};
use logging_channel::message::{Hello, Message};
use logging_channel::stream::MessageReader;

use super::MS;
use super::checker::Claim;
use super::link::Connection;
use super::sim_event::{SimEvent, SimResult};
use super::world::World;

impl World {
    /// A process tries to connect to its peer, until the two have met.
    pub fn connect(&mut self, host: usize, id: u64) -> SimResult {
        let Some(process) = &self.hosts[host].process else { return Ok(()) };
        let connected = self.connection.as_ref().is_some_and(|(_, c)| c.open[host]);
        if process.agent.status(0).phase != Phase::Starting
            || self.refuses_key_of(0)
            || self.refuses_key_of(1)
        {
            return Ok(());
        }
        self.schedule_between(3 * MS, 15 * MS, SimEvent::Connect { host, id });
        let reachable = self.cut_until.iter().all(|until| *until <= self.now);
        let peer = 1 - host;
        if connected
            || !reachable
            || self.hosts[peer].process.is_none()
            || self.hosts[peer].paused_until > self.now
        {
            return Ok(());
        }
        if self.connection.as_ref().is_some_and(|(_, c)| c.open[peer]) {
            return self.say_hello_as_stranger(host);
        }
        let connection = self.processes << 32 | self.scheduled;
        self.connection = Some((connection, Connection::new()));
        self.handle_event(host, Event::Connected { peer_key: None })?;
        self.handle_event(peer, Event::Connected { peer_key: None })
    }

    /// The peer has a connection already: it reads the hello on this one and closes it.
    pub fn say_hello_as_stranger(&mut self, host: usize) -> SimResult {
        let clock = self.clock(host);
        let Some(process) = &mut self.hosts[host].process else { return Ok(()) };
        process.agent.handle(clock, Event::Connected { peer_key: None });
        let mut inbox = MessageReader::new();
        while !process.agent.outgoing().is_empty() {
            let bytes = process.agent.outgoing().to_vec();
            inbox.push(&bytes);
            process.agent.wrote(bytes.len());
        }
        process.agent.handle(clock, Event::Disconnected);
        let Ok(Some(Message::Hello(hello))) = inbox.next_message() else {
            // The process is no longer looking for a peer.
            return self.do_actions(host);
        };
        self.do_actions(host)?;
        self.claim(1 - host, &hello, true)
    }

    /// A process says hello to a host on a second connection. The host reads first what has arrived from its
    /// peer.
    pub fn claim(&mut self, host: usize, hello: &Hello, same_certificate: bool) -> SimResult {
        let is_revoked = same_certificate && self.revoked[1 - host].peer;
        if is_revoked && self.refuses_key_of(1 - host) {
            return Ok(());
        }
        self.read(host, usize::MAX)?;
        self.checker.counts.claims += 1;
        let silence_ns = self.clock(host).saturating_sub(self.heard_at[host]);
        let claim = Claim { same_certificate, is_revoked, silence_ns };
        self.claims[host] = Some(claim);
        self.trace(host, &claim);
        self.handle_event(host, Event::Stranger { hello, same_certificate })
    }

    pub fn arrive(&mut self, connection: u64, to: usize) -> SimResult {
        let cut_until = self.cut_until[to];
        if cut_until > self.now {
            self.schedule_at(cut_until + MS / 10, SimEvent::Arrive { connection, to });
            return Ok(());
        }
        if let Some((id, c)) = &mut self.connection
            && *id == connection
        {
            c.arrive(to);
        }
        if let Some(process) = &self.hosts[to].process {
            let id = process.id;
            self.schedule_between(0, MS / 20, SimEvent::Read { host: to, id });
        }
        Ok(())
    }

    pub fn read(&mut self, host: usize, max: usize) -> SimResult {
        let Some((_, connection)) = &mut self.connection else { return Ok(()) };
        let Some(process) = &self.hosts[host].process else { return Ok(()) };
        if !connection.open[host] {
            return Ok(());
        }
        let id = process.id;
        let read = connection.read(host, max);
        if !read.bytes.is_empty() {
            self.heard_at[host] = self.clock(host);
            self.handle_event(host, Event::Received(&read.bytes))?;
            self.schedule_between(0, MS / 20, SimEvent::Read { host, id });
            // The other side's socket has room again.
            self.write(1 - host);
        } else if read.ended {
            self.close(host);
            self.handle_event(host, Event::Disconnected)?;
        }
        Ok(())
    }

    /// A host closes its side of the connection.
    pub fn close(&mut self, host: usize) {
        let Some((id, connection)) = &mut self.connection else { return };
        if connection.open[host] {
            let event = SimEvent::Arrive { connection: *id, to: 1 - host };
            let arrives = connection.close(host, self.now, &mut self.rng);
            self.schedule_at(arrives, event);
        }
    }

    pub fn reset(&mut self, told: [bool; 2]) {
        let Some((_, connection)) = &mut self.connection else { return };
        for (host, told) in told.into_iter().enumerate() {
            connection.lose(host, 0);
            if told {
                connection.reset(host);
            }
        }
        let ids = [0, 1].map(|h| self.hosts[h].process.as_ref().map(|p| p.id));
        for (host, id) in ids.into_iter().enumerate() {
            if let Some(id) = id.filter(|_| told[host]) {
                self.schedule_between(0, MS, SimEvent::Read { host, id });
            }
        }
    }
}
