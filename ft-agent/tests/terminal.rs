//! `vmft run` and `vmft console` on a terminal that a shell with job control also uses.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};
use support::has_guest;
use support::pair::Host;
use support::row::{LIVES, pair};
use support::vm::VMFT;

const RUN: &str = "run --guest bare --memory-mib 16 --cmdline hz=19";
/// What the guest says when it takes keys.
const SERVES: &str = "only the console is served";

/// A terminal with a shell.
struct Shell {
    terminal: File,
    /// The shell's side, open so that the mode can be read when no process is left.
    own: OwnedFd,
    shell: Child,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Shell {
    fn start() -> Shell {
        let pty = openpty(None, None).unwrap();
        let side = || Stdio::from(pty.slave.try_clone().unwrap());
        // Without line editing, the shell leaves the terminal's mode alone.
        let mut shell = Command::new("setsid");
        // A shell leaves ignored what was ignored when it was started, as SIGHUP is by nohup.
        let shell = shell.args(["--ctty", "--wait", "env", "--default-signal"]);
        let shell = shell.args(["bash", "--norc", "--noprofile", "--noediting", "-i"]);
        let shell = shell.env("PS1", "shell> ").env("HISTFILE", "");
        let shell = shell.stdin(side()).stdout(side()).stderr(side()).spawn().expect("setsid");
        let terminal = File::from(pty.master);
        let mut reader = terminal.try_clone().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut shell = Shell { terminal, own: pty.slave, shell, output, seen: String::new() };
        shell.wait_for("shell> ");
        shell
    }

    fn type_in(&mut self, keys: &str) {
        self.seen.clear();
        self.terminal.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the terminal shows a text after what was typed last.
    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.seen.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(e) => panic!("no {text:?} ({e}) in:\n{}", self.seen),
            }
        }
    }

    /// Waits until the terminal is raw, or is as a shell needs it.
    fn wait_for_mode(&mut self, raw: bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let flags = tcgetattr(&self.own).unwrap().local_flags;
            let lines = flags.contains(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG);
            if lines != raw {
                return;
            }
            assert!(Instant::now() < deadline, "raw is not {raw}: {flags:?}\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal to the shell's first job.
    fn signal(&mut self, signal: &str) {
        let list = Command::new("pgrep").args(["-P", &self.shell_id().to_string()]).output().unwrap();
        let id = String::from_utf8_lossy(&list.stdout).trim().to_owned();
        let sent = Command::new("kill").args([&format!("-{signal}"), &id]).status().unwrap();
        assert!(sent.success(), "{signal} to {id:?}");
    }

    /// The shell's process, the child of setsid if that has forked.
    fn shell_id(&self) -> u32 {
        let list = Command::new("pgrep").args(["-P", &self.shell.id().to_string(), "-x", "bash"]).output();
        let list = String::from_utf8_lossy(&list.unwrap().stdout).trim().to_owned();
        list.parse().unwrap_or(self.shell.id())
    }

    /// Starts the guest in the foreground, and waits until it takes keys.
    fn run(&mut self) {
        self.type_in(&format!("{VMFT} {RUN}\n"));
        self.wait_for(SERVES);
        self.wait_for_mode(true);
    }

    /// The guest takes keys and answers.
    fn guest_answers(&mut self) {
        self.type_in("add 40\n");
        self.wait_for("ok ");
    }

    /// Ctrl-A x ends the run, and the shell has its terminal back.
    fn quit(&mut self) {
        self.type_in("\x01x");
        self.wait_for("shell> ");
        self.wait_for_mode(false);
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The session's processes end with it.
        for signal in ["HUP", "CONT", "KILL"] {
            let id = self.shell_id().to_string();
            let ended = Command::new("pkill").args([&format!("-{signal}"), "-s", &id]).status();
            assert!(ended.is_ok(), "pkill");
        }
        self.shell.kill().ok();
        self.shell.wait().expect("wait");
    }
}

#[test]
fn a_run_in_the_background_boots_and_leaves_the_terminal_alone() {
    if !has_guest("a_run_in_the_background_boots_and_leaves_the_terminal_alone", "bare") {
        return;
    }
    let mut shell = Shell::start();
    shell.type_in(&format!("{VMFT} {RUN} &\n"));
    shell.wait_for(SERVES);
    shell.wait_for_mode(false);
    // The shell gets what is typed, and the run is not stopped for it.
    shell.type_in("jobs; echo $((6 * 7))\n");
    shell.wait_for("Running");
    shell.wait_for("42");
    shell.type_in("fg\n");
    shell.wait_for_mode(true);
    shell.guest_answers();
    shell.quit();
}

#[test]
fn every_signal_that_ends_the_run_restores_the_terminal() {
    if !has_guest("every_signal_that_ends_the_run_restores_the_terminal", "bare") {
        return;
    }
    let mut shell = Shell::start();
    for signal in ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2"] {
        shell.run();
        shell.seen.clear();
        shell.signal(signal);
        shell.wait_for("shell> ");
        shell.wait_for_mode(false);
    }
}

#[test]
fn a_stopped_run_gives_the_terminal_back_and_takes_it_again_in_the_foreground() {
    const TEST: &str = "a_stopped_run_gives_the_terminal_back_and_takes_it_again_in_the_foreground";
    if !has_guest(TEST, "bare") {
        return;
    }
    let mut shell = Shell::start();
    shell.run();
    for signal in ["TSTP", "STOP"] {
        shell.seen.clear();
        shell.signal(signal);
        shell.wait_for("Stopped");
        if signal == "TSTP" {
            shell.wait_for_mode(false);
        }
        shell.type_in("fg\n");
        shell.wait_for("vmft");
        shell.wait_for_mode(true);
        shell.guest_answers();
    }
    // In the background it goes on without the terminal.
    shell.signal("TSTP");
    shell.wait_for("Stopped");
    shell.type_in("bg; echo $((6 * 7))\n");
    shell.wait_for("42");
    shell.wait_for_mode(false);
    shell.type_in("fg\n");
    shell.wait_for_mode(true);
    shell.guest_answers();
    shell.quit();
}

#[test]
fn a_terminal_that_others_made_non_blocking_takes_keys() {
    if !has_guest("a_terminal_that_others_made_non_blocking_takes_keys", "bare") {
        return;
    }
    let mut shell = Shell::start();
    shell.run();
    fcntl(&shell.own, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).unwrap();
    for _ in 0..3 {
        shell.guest_answers();
    }
    fcntl(&shell.own, FcntlArg::F_SETFL(OFlag::O_RDWR)).unwrap();
    shell.quit();
}

#[test]
fn a_console_restores_the_terminal_however_it_ends() {
    let Some((site, mut a, b, client)) = pair("a_console_restores_the_terminal_however_it_ends") else {
        return;
    };
    // The counter is one for all clients, and the next is at the console.
    client.wait_for(50, 30);
    client.finish().expect("one history");
    let mut shell = Shell::start();
    let console = format!("{VMFT} console --control {}\n", site.control(Host::A).display());
    for signal in ["HUP", "INT", "QUIT", "TERM", "USR1"] {
        shell.type_in(&console);
        shell.wait_for_mode(true);
        shell.guest_answers();
        shell.seen.clear();
        shell.signal(signal);
        shell.wait_for("shell> ");
        shell.wait_for_mode(false);
    }
    shell.type_in(&console);
    shell.wait_for_mode(true);
    shell.signal("TSTP");
    shell.wait_for("Stopped");
    shell.wait_for_mode(false);
    shell.type_in("fg\n");
    shell.wait_for_mode(true);
    shell.guest_answers();
    shell.quit();
    drop(b);
    a.wait_for(LIVES, 30);
    a.stop();
    let (status, output) = a.finish(30);
    assert!(status.success() && !output.contains("divergence"), "{output}");
}
