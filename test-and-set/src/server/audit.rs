//! The audit: who asked for what, and what the answer was, as a line on each member's standard output.
//!
//! Each member writes the same lines, because they come from the log: one for each command that was applied, also those that the
//! rule refused, and one for each note. Nothing waits for them: a thread of its own gathers them for a moment and writes them
//! together, and lines that it cannot write fast enough are left out and counted. What was applied after the last snapshot is applied again when a member starts, so its lines
//! come again, with the same numbers.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use host_log::descriptor::SharedOutput;
use serde::{Deserialize, Serialize};
use tracing::error;

use crate::names::VmName;
use crate::record::{Asker, Command, CommandReply, Member};

/// How many lines may wait for the thread that writes them.
const WAITING_MAX: usize = 4096;
/// How long lines are gathered before they are written. If each were written at once, all members' threads would be woken at the
/// very time at which the verdict is on its way, and on a machine with few CPUs it would wait for them.
const GATHERING: Duration = Duration::from_millis(20);

/// What somebody asked for that changes no record, such as a change of the members. It is in the log, so that every member has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AuditNote {
    /// Who asked.
    pub asker: Asker,
    /// For what.
    pub what: String,
    /// What became of it.
    pub verdict: String,
}

/// Where the lines go. Clones share one thread, which ends with the last of them.
#[derive(Clone)]
pub struct Audit {
    lines: SyncSender<String>,
    left_out: Arc<AtomicU64>,
}

impl Audit {
    /// An audit that writes to standard output.
    ///
    /// # Errors
    /// Its thread cannot be started.
    pub fn start() -> io::Result<Self> {
        Self::to(SharedOutput(io::stdout()))
    }

    fn to(out: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, waiting) = sync_channel(WAITING_MAX);
        let left_out = Arc::new(AtomicU64::new(0));
        let audit = Self { lines, left_out: left_out.clone() };
        std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || write_all(out, &waiting, &left_out))?;
        Ok(audit)
    }

    /// The command at this index of the log was applied, and got this reply.
    pub fn command(&self, index: u64, asker: &Asker, vm: &VmName, command: &Command, reply: &CommandReply) {
        self.line(format!("audit {index}: {asker}: {}: {}", request(vm, command), verdict(reply)));
    }

    /// The note at this index of the log.
    pub fn note(&self, index: u64, AuditNote { asker, what, verdict }: &AuditNote) {
        self.line(format!("audit {index}: {asker}: {what}: {verdict}"));
    }

    fn line(&self, line: String) {
        // Some text is the asker's own, and must not look like another line.
        let line = line.replace(char::is_control, "\u{fffd}");
        if self.lines.try_send(line).is_err() {
            self.left_out.fetch_add(1, Relaxed);
        }
    }
}

fn write_all(mut out: impl Write, waiting: &Receiver<String>, left_out: &AtomicU64) {
    let mut broken = false;
    while let Ok(first) = waiting.recv() {
        std::thread::sleep(GATHERING);
        let mut text = first + "\n";
        for line in waiting.try_iter().take(WAITING_MAX) {
            text += &line;
            text.push('\n');
        }
        let missing = left_out.swap(0, Relaxed);
        if missing > 0 {
            text +=
                &format!("audit: {missing} lines are missing here, because standard output was too slow\n");
        }
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush())
            && !std::mem::replace(&mut broken, true)
        {
            error!(
                "cannot write the audit's lines to standard output; they are missing from here on: {error}"
            );
        }
    }
}

fn request(vm: &VmName, command: &Command) -> String {
    match command {
        Command::Take { generation, who } => format!("take generation {generation} of VM {vm} for {who}"),
        Command::Open { generation, members } => {
            let backup = members.backup.as_ref().map_or("no backup".into(), side);
            format!("open generation {generation} of VM {vm} for {} and {backup}", side(&members.primary))
        }
        Command::End { generation, who } => format!("end generation {generation} of VM {vm} for {who}"),
        Command::Forget { generation } => format!("forget generation {generation} of VM {vm}"),
    }
}

fn side(member: &Member) -> String {
    match &member.host {
        Some(host) => format!("{} on {host}", member.incarnation),
        None => member.incarnation.to_string(),
    }
}

fn verdict(reply: &CommandReply) -> String {
    match reply {
        CommandReply::Won => "won".into(),
        CommandReply::Lost(holder) => format!("lost to {holder}"),
        CommandReply::Done => "done".into(),
        CommandReply::Stale => "stale".into(),
        CommandReply::Refused(refusal) => format!("refused: {refusal}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;
    use crate::names::{Generation, Incarnation};

    /// Passes on what is written, once it is allowed to.
    struct Gated {
        go: Receiver<()>,
        out: Sender<String>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.go.recv().ok();
            self.out.send(String::from_utf8_lossy(bytes).into_owned()).ok();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn note(audit: &Audit, index: u64) {
        let asker = Asker { host: None, operator: Some("admin".parse().unwrap()) };
        audit.note(index, &AuditNote { asker, what: "remove member 2".into(), verdict: "done".into() });
    }

    #[test]
    fn a_slow_reader_delays_nobody_and_is_told_what_is_missing() {
        let ((go, gate), (out, written)) = (channel(), channel());
        let audit = Audit::to(Gated { go: gate, out }).unwrap();
        let most = 5 * WAITING_MAX;
        (0..most as u64).for_each(|index| note(&audit, index));
        drop((go, audit));
        let text: String = written.iter().collect();
        assert!(text.starts_with("audit 0: operator admin: remove member 2: done\n"), "{text}");
        let (missing, kept): (Vec<&str>, Vec<&str>) =
            text.lines().partition(|line| line.ends_with("because standard output was too slow"));
        assert!((WAITING_MAX..=3 * WAITING_MAX).contains(&kept.len()), "{} lines are kept", kept.len());
        let counts = missing.iter().filter_map(|line| line.split(' ').nth(1)?.parse::<usize>().ok());
        assert_eq!(counts.sum::<usize>() + kept.len(), most, "{missing:?}");
    }

    #[test]
    fn a_line_says_who_what_and_the_verdict() {
        let ((go, gate), (out, written)) = (channel(), channel());
        let audit = Audit::to(Gated { go: gate, out }).unwrap();
        drop(go);
        let who = Incarnation::try_from(7).unwrap();
        let asker = Asker { host: Some("a".parse().unwrap()), operator: None };
        let take = Command::Take { generation: Generation(3), who };
        audit.command(57, &asker, &"web".parse().unwrap(), &take, &CommandReply::Won);
        let what = "add member 4 at x\naudit 58: operator admin: forged".into();
        audit.note(58, &AuditNote { asker, what, verdict: "refused".into() });
        drop(audit);
        let text: String = written.iter().collect();
        let first = format!("audit 57: host a: take generation 3 of VM web for {who}: won\n");
        let second = "audit 58: host a: add member 4 at x\u{fffd}audit 58: operator admin: forged: refused\n";
        assert_eq!(text, first + second);
    }
}
