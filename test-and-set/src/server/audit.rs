//! The audit: who asked for what, and what the answer was, as a line on each member's standard output.
//!
//! Each member writes the same lines, because they come from the log: one for each command that was applied, also those that the
//! rule refused, and one for each note. Nothing waits for them: a thread of its own writes them, and lines that it cannot write fast
//! enough are left out and counted. What was applied after the last snapshot is applied again when a member starts, so its lines
//! come again, with the same numbers.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use serde::{Deserialize, Serialize};

use crate::names::VmName;
use crate::record::{Asker, Command, CommandReply, Member};

/// How many lines may wait for the thread that writes them.
const WAITING_MAX: usize = 4096;

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
        Self::to(io::stdout())
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
    for line in waiting {
        let mut written = writeln!(out, "{line}");
        let missing = left_out.swap(0, Relaxed);
        if missing > 0 {
            written = written.and_then(|()| {
                writeln!(out, "audit: {missing} lines are missing here, because standard output was too slow")
            });
        }
        if let Err(error) = written.and_then(|()| out.flush())
            && !std::mem::replace(&mut broken, true)
        {
            eprintln!(
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
    use std::time::Duration;

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
        let most = 3 * WAITING_MAX as u64;
        (0..most).for_each(|index| note(&audit, index));
        drop(go);
        let read = || written.recv_timeout(Duration::from_secs(10)).unwrap();
        let mut text = String::new();
        while !text.contains("lines are missing") {
            text += &read();
        }
        assert!(text.starts_with("audit 0: operator admin: remove member 2: done\n"), "{text}");
        // One line was with the writer, or none.
        let kept = WAITING_MAX as u64;
        let counts = [kept, kept + 1].map(|kept| format!("audit: {} lines are missing", most - kept));
        assert!(counts.iter().any(|count| text.contains(count)), "{text}");
        drop(audit);
        while let Ok(more) = written.recv_timeout(Duration::from_secs(10)) {
            text += &more;
        }
        assert!(text.contains(&format!("audit {}: ", kept - 1)), "what waited is written");
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
