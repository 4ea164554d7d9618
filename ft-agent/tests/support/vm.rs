//! A running `vmft`.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The binary under test.
pub const VMFT: &str = env!("CARGO_BIN_EXE_vmft");

/// A command that runs `vmft` in a network namespace.
pub fn vmft_in(namespace: &str) -> Command {
    let mut c = Command::new("ip");
    c.args(["netns", "exec", namespace, VMFT]);
    c
}

/// The same command with another build of `vmft`.
pub fn with_program(vmft: Command, program: &std::path::Path) -> Command {
    let mut command = Command::new(vmft.get_program());
    command.args(vmft.get_args().map(|arg| if arg == VMFT { program.as_os_str() } else { arg }));
    command.envs(vmft.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

/// The same command under a wrapper: these words are put before the program, and have to execute it.
pub fn under(vmft: Command, wrapper: &[&str]) -> Command {
    let mut args = vmft.get_args().map(|arg| arg.to_owned()).collect::<Vec<_>>();
    let place = args.iter().position(|arg| arg == VMFT).expect("the program");
    args.splice(place..place, wrapper.iter().map(Into::into));
    let mut command = Command::new(vmft.get_program());
    command.args(args).envs(vmft.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

/// A `vmft` process and what it prints. Killed on drop.
pub struct Vm {
    child: Child,
    control: Option<PathBuf>,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Vm {
    /// Starts vmft and captures its output.
    pub fn start(command: &mut Command) -> Vm {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmft could not be started");
        let (sender, output) = channel();
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("piped")), Box::new(child.stderr.take().expect("piped"))];
        for mut stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if std::env::var_os("VMFT_ECHO").is_some() {
                        eprint!("{}", String::from_utf8_lossy(&buffer[..n]));
                    }
                    if sender.send(buffer[..n].to_vec()).is_err() {
                        return;
                    }
                }
            });
        }
        let mut args = command.get_args().skip_while(|arg| *arg != "--control").skip(1);
        let control = args.next().map(PathBuf::from);
        Vm { child, control, output, seen: String::new() }
    }

    /// Waits until `text` has been printed on either stream. Panics with all output if that takes longer than
    /// `seconds`.
    pub fn wait_for(&mut self, text: &str, seconds: u64) {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !self.seen.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => panic!("no {text:?} after {seconds} s in:\n{}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("vmft ended without {text:?}:\n{}", self.seen),
            }
        }
    }

    /// Types into the console.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("vmft's standard input");
    }

    /// Waits for the end. Returns the exit status and all output.
    pub fn finish(mut self, seconds: u64) -> (ExitStatus, String) {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let mut seen = std::mem::take(&mut self.seen);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => panic!("vmft still runs after {seconds} s:\n{seen}"),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        (self.child.wait().expect("wait"), seen)
    }

    /// Waits until `text` is printed again.
    pub fn wait_for_again(&mut self, text: &str, seconds: u64) {
        self.seen.clear();
        self.wait_for(text, seconds);
    }

    /// Whether the process has ended.
    pub fn has_ended(&self) -> bool {
        let path = format!("/proc/{}/stat", self.id());
        let stat = std::fs::read_to_string(path).unwrap_or_default();
        stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z') || rest.is_empty())
    }

    /// Whether it has printed `text` by now.
    pub fn has_printed(&mut self, text: &str) -> bool {
        for bytes in self.output.try_iter() {
            self.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
        self.seen.contains(text)
    }

    /// Its output so far, as far as it has been read.
    pub fn seen(&self) -> &str {
        &self.seen
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let id = nix::unistd::Pid::from_raw(self.id() as i32);
        nix::sys::signal::kill(id, signal).expect("kill");
    }

    /// Ends a VM that runs on this side alone, as an operator does: SIGTERM does not.
    pub fn stop(&self) {
        let control = self.control.as_ref().expect("a control socket");
        let stop =
            Command::new(VMFT).args(["stop", "--yes", "--control"]).arg(control).output().expect("vmft");
        assert!(stop.status.success(), "{}", String::from_utf8_lossy(&stop.stderr));
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
    }

    /// Process id (of `ip netns exec`, which becomes vmft).
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended already.
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            self.child.kill().expect("kill");
        }
        self.child.wait().expect("wait");
    }
}
