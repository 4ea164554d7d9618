//! Three members that are killed, paused, damaged, restored from old copies and cut off from each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rustix::process::{Pid, Signal, kill_process};

use super::Running;
use super::net::Net;

pub const MEMBERS: [u8; 3] = [1, 2, 3];
pub const CLIENT: u8 = 100;
pub const PORT: u16 = 7000;
/// The name of the operator's keys.
pub const OPERATOR: &str = "admin";
/// Three members, each in a network namespace of its own.
pub struct Members3<'n> {
    pub net: &'n Net,
    pub dir: PathBuf,
    pub nodes: BTreeMap<u8, Running>,
    /// The members of whose data there is an old copy.
    pub copied: BTreeSet<u8>,
}

impl Members3<'_> {
    pub fn start(&mut self, id: u8) {
        let peers: Vec<_> = MEMBERS.iter().map(|i| format!("{i}={}:{PORT}", Net::address(*i))).collect();
        self.start_as(id, &["--peers", &peers.join(",")]);
    }

    fn start_as(&mut self, id: u8, how: &[&str]) {
        let mut command = Process::new("ip");
        command.args(["netns", "exec", &self.net.namespace(id), env!("CARGO_BIN_EXE_vmft-store"), "serve"]);
        command.args(["--id", &id.to_string(), "--listen", &format!("{}:{PORT}", Net::address(id))]);
        // Few commands between snapshots, so that snapshots and purges are tried, too.
        command.args(how).args(["--snapshot-every", "500", "--names-per-host", "1000000"]);
        command.arg("--data").arg(self.data(id)).arg("--keys").arg(self.dir.join(format!("keys/{id}")));
        self.nodes.insert(id, Running::start(&mut command, &self.dir.join(format!("{id}.log"))));
    }

    fn data(&self, id: u8) -> PathBuf {
        self.dir.join(format!("data{id}"))
    }

    pub fn url(&self, party: &str) -> String {
        let nodes: Vec<_> = MEMBERS.iter().map(|id| format!("{}:{PORT}", Net::address(*id))).collect();
        format!("raft://{}?keys={}", nodes.join(","), self.dir.join("keys").join(party).display())
    }

    /// Runs `vmft-store member` where the clients are.
    fn change_members(&self, args: &[&str]) {
        let mut command = Process::new("ip");
        command.args([
            "netns",
            "exec",
            &self.net.namespace(CLIENT),
            env!("CARGO_BIN_EXE_vmft-store"),
            "member",
        ]);
        command.args(args).args(["--patience", "30", "--store", &self.url(OPERATOR)]);
        let output = command.output().expect("vmft-store");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Damages a file of a member that is down, and starts the member. If it refuses its data, it is added anew.
    fn damage_for(
        &mut self,
        id: u8,
        random: &mut StdRng,
        hold: Duration,
        wait: impl Fn(Duration),
    ) -> &'static str {
        self.kill(id);
        let file = ["log.redb", "snapshot.redb", "journal"].choose(random).expect("files");
        super::damage::damage(&self.data(id).join(file), random).expect("to damage a file");
        wait(hold);
        self.start(id);
        match self.added_anew_if_refused(id, "is damaged", wait) {
            true => "damage one, which refuses",
            false => "damage one, which has everything",
        }
    }

    /// Waits until a member that was just started has refused its data, with these words; then removes it and adds it anew. Returns
    /// whether it did.
    fn added_anew_if_refused(&mut self, id: u8, words: &str, wait: impl Fn(Duration)) -> bool {
        for _ in 0..20 {
            wait(Duration::from_millis(100));
            let member = &mut self.nodes.get_mut(&id).expect("a member").0;
            if member.try_wait().expect("its state").is_some() {
                let log = std::fs::read_to_string(self.dir.join(format!("{id}.log"))).expect("its log");
                assert!(log.lines().last().is_some_and(|line| line.contains(words)), "{log}");
                self.change_members(&["remove", &id.to_string()]);
                std::fs::remove_dir_all(self.data(id)).expect("to remove its data");
                self.copied.remove(&id);
                self.start_as(id, &["--join"]);
                self.change_members(&["add", &id.to_string(), &format!("{}:{PORT}", Net::address(id))]);
                return true;
            }
        }
        false
    }

    fn copy(&self, from: &Path, to: &Path) {
        std::fs::remove_dir_all(to).ok();
        let copied = Process::new("cp").arg("-a").arg(from).arg(to).status().expect("cp");
        assert!(copied.success());
    }

    /// Stops a member and starts it with an old copy of its data; the others tell it, and it is added anew. Without a copy, takes
    /// one for a later round.
    fn restore_for(&mut self, id: u8, hold: Duration, wait: impl Fn(Duration)) -> &'static str {
        self.kill(id);
        let copy = self.dir.join(format!("copy{id}"));
        if self.copied.insert(id) {
            self.copy(&self.data(id), &copy);
            wait(hold);
            self.start(id);
            return "copy one";
        }
        self.copy(&copy, &self.data(id));
        wait(hold);
        self.start(id);
        match self.added_anew_if_refused(id, " remembers change ", wait) {
            true => "restore one, which is told and ends",
            false => "restore one, of which nobody remembers more",
        }
    }

    fn signal(&self, id: u8, signal: Signal) {
        let pid = Pid::from_child(&self.nodes[&id].0);
        kill_process(pid, signal).expect("to signal a member");
    }

    fn kill(&mut self, id: u8) {
        self.nodes.remove(&id).expect("a running member").kill();
    }

    /// Causes a random fault, waits, and repairs it; returns its name.
    pub fn round(&mut self, random: &mut StdRng, wait: impl Fn(Duration)) -> &'static str {
        let hold = Duration::from_millis(random.random_range(200..1500));
        let mut order = MEMBERS;
        rand::seq::SliceRandom::shuffle(&mut order[..], random);
        let [a, b, c] = order;
        let cut_both = |x, y| {
            self.net.cut(x, y);
            self.net.cut(y, x);
        };
        match random.random_range(0..15) {
            0 => self.kill_for(&[a], hold, wait, "kill one"),
            1 => self.kill_for(&[a, b], hold, wait, "kill two"),
            2 => self.kill_for(&[a, b, c], hold, wait, "kill all"),
            3 => self.pause_for(&[a], hold, wait, "pause one"),
            4 => self.pause_for(&[a, b], hold, wait, "pause two"),
            5 => {
                self.signal(a, Signal::STOP);
                self.kill_for(&[b], hold, wait, "");
                self.signal(a, Signal::CONT);
                "pause one, kill another"
            }
            6 => {
                [b, c].into_iter().for_each(|other| cut_both(a, other));
                self.healed_after(hold, wait, "one from the others")
            }
            7 => {
                self.net.cut(a, b);
                self.healed_after(hold, wait, "one link one way")
            }
            8 => {
                // It receives nothing but can send, or the other way round.
                let deaf = random.random_bool(0.5);
                [b, c]
                    .into_iter()
                    .for_each(|other| if deaf { self.net.cut(other, a) } else { self.net.cut(a, other) });
                self.healed_after(hold, wait, "one from the others, one way")
            }
            12..15 => self.restore_for(a, hold, wait),
            9 | 10 => self.damage_for(a, random, hold, wait),
            _ => {
                // The client reaches only one member, which the others do not reach, and one more link is cut in one direction.
                [(a, b), (a, c), (b, CLIENT)].into_iter().for_each(|(x, y)| cut_both(x, y));
                self.net.cut(c, CLIENT);
                self.healed_after(hold, wait, "client and leader apart")
            }
        }
    }

    fn kill_for(
        &mut self,
        ids: &[u8],
        hold: Duration,
        wait: impl Fn(Duration),
        name: &'static str,
    ) -> &'static str {
        ids.iter().for_each(|id| self.kill(*id));
        wait(hold);
        ids.iter().for_each(|id| self.start(*id));
        name
    }

    fn pause_for(
        &self,
        ids: &[u8],
        hold: Duration,
        wait: impl Fn(Duration),
        name: &'static str,
    ) -> &'static str {
        ids.iter().for_each(|id| self.signal(*id, Signal::STOP));
        wait(hold);
        ids.iter().for_each(|id| self.signal(*id, Signal::CONT));
        name
    }

    fn healed_after(&self, hold: Duration, wait: impl Fn(Duration), name: &'static str) -> &'static str {
        wait(hold);
        self.net.heal();
        name
    }
}
