//! `--metrics ADDRESS:PORT`: answers `GET /metrics` of Prometheus, over plain HTTP.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use test_and_set::names::VmName;

use super::admission::{Admission, TimedStream};
use super::replica::Replica;
use super::report::ReplicaReport;
use crate::error::Error;
use crate::service;

/// How many scrapes are answered at once; the oldest is closed if there are more.
const SCRAPES_MAX: usize = 8;
/// The longest request, bytes.
const REQUEST_BYTES_MAX: u64 = 4096;
/// How long a client may take for its request and for reading the answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers scrapes as long as the process lives. `find` returns the replica, or `None` if there is none yet.
///
/// # Errors
/// The process cannot listen on the address.
pub fn listen(
    address: SocketAddr,
    vm: VmName,
    find: impl Fn() -> Option<Arc<Replica>> + Send + Sync + 'static,
) -> Result<(), Error> {
    let listener = TcpListener::bind(address)
        .map_err(Error::host(format!("cannot listen on {address} for --metrics")))?;
    let metrics = Arc::new(move || text(&vm, find().map(|replica| replica.report()).as_ref()));
    let accept = move || {
        let metrics = metrics.clone();
        Admission::new("metrics", SCRAPES_MAX).accept_all(&listener, move |tcp, _ticket| {
            answer(tcp, &*metrics).map_err(|e| format!("no complete scrape in {PATIENCE:?}: {e}"))
        })
    };
    service::start("metrics", accept)
}

fn answer(tcp: TcpStream, metrics: impl FnOnce() -> String) -> io::Result<()> {
    let mut tcp = TimedStream::new(tcp, PATIENCE);
    let (mut request, mut buffer) = (Vec::new(), [0; 512]);
    let mut reader = (&mut tcp).take(REQUEST_BYTES_MAX);
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        match reader.read(&mut buffer)? {
            0 => return Ok(()),
            n => request.extend_from_slice(&buffer[..n]),
        }
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") {
        ("200 OK", metrics())
    } else {
        ("404 Not Found", "there is only GET /metrics here\n".into())
    };
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    tcp.write_all(answer.as_bytes())
}

/// The metrics in Prometheus' text format. Without a replica `vmft_protected` and
/// `vmft_state` are 0, and little else is there.
fn text(vm: &VmName, report: Option<&ReplicaReport>) -> String {
    let mut text = protection(vm, report);
    let missing = host_log::lines_missing() as f64;
    let help = "lines of the log that standard error did not take";
    metric(&mut text, vm, "log_lines_missing_total", "counter", help, missing);
    let Some(r) = report else { return text };
    let count = |n: u64| n as f64;
    for (name, kind, help, value) in [
        ("is_primary", "gauge", "1 if this side has started as primary", f64::from(r.role == "primary")),
        (
            "is_alone",
            "gauge",
            "1 if this side runs the guest without a backup",
            f64::from(r.phase == "alone"),
        ),
        (
            "store_answers",
            "gauge",
            "0 if the store has not answered this side for 15 s",
            f64::from(r.store_answers),
        ),
        ("generation", "gauge", "the pair's generation", count(r.generation.unwrap_or(0))),
        (
            "records_recorded_total",
            "counter",
            "records made (primary) or received (backup)",
            count(r.recorded),
        ),
        ("records_sent_total", "counter", "records sent", count(r.sent)),
        ("records_acknowledged_total", "counter", "records that the backup has acknowledged", count(r.acked)),
        ("records_replayed_total", "counter", "records that the backup has replayed", count(r.replayed)),
        ("outputs_recorded_total", "counter", "outputs that the guest has made", count(r.outputs_recorded)),
        ("outputs_released_total", "counter", "outputs that have left", count(r.outputs_released)),
        ("outputs_held", "gauge", "outputs that wait for the backup", count(r.outputs_held)),
        ("lag_seconds", "gauge", "how far the backup lags", r.lag_ms / 1e3),
        ("lag_bytes", "gauge", "bytes of the records that the backup has not replayed", count(r.lag_bytes)),
        (
            "log_bytes_total",
            "counter",
            "bytes of the channel's messages, sent and received",
            count(r.log_bytes),
        ),
        ("failovers_total", "counter", "times that this side went on without the other", count(r.failovers)),
    ] {
        metric(&mut text, vm, name, kind, help, value);
    }
    text
}

/// Whether the VM is protected, and what that depends on.
fn protection(vm: &VmName, report: Option<&ReplicaReport>) -> String {
    let mut text = String::new();
    let protected = report.is_some_and(|r| r.protected);
    metric(
        &mut text,
        vm,
        "protected",
        "gauge",
        "1 if the VM survives the loss of either host",
        f64::from(protected),
    );
    let state = match report.map(|r| r.state.as_str()) {
        Some("PROTECTED") => 2.0,
        Some("AT RISK") => 1.0,
        _ => 0.0,
    };
    metric(
        &mut text,
        vm,
        "state",
        "gauge",
        "2 if the VM is PROTECTED, 1 if AT RISK, 0 if UNPROTECTED",
        state,
    );
    let Some(r) = report else { return text };
    // There is no age while nothing is asked, and no round trip without a peer.
    if let Some(ms) = r.store_answered_ago_ms {
        let help = "how long ago a quorum of the store last answered this side";
        metric(&mut text, vm, "store_answer_age_seconds", "gauge", help, ms / 1e3);
    }
    if let Some(ms) = r.round_trip_ms {
        let help = "how old the other side's last confirmation was when it came";
        metric(&mut text, vm, "round_trip_seconds", "gauge", help, ms / 1e3);
    }
    text
}

fn metric(text: &mut String, vm: &VmName, name: &str, kind: &str, help: &str, value: f64) {
    // Writing to a string does not fail.
    write!(
        text,
        "# HELP vmft_{name} {help}\n# TYPE vmft_{name} {kind}\nvmft_{name}{{vm=\"{}\"}} {value}\n",
        vm.as_str()
    )
    .unwrap_or_else(|e| unreachable!("{e}"));
}
