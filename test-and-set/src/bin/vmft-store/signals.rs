//! Signals to a member of the store.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals that would end a process that does nothing about them. A member has nothing to do for them: it reads changed
/// keys by itself.
fn ignored() -> [SignalKind; 6] {
    [
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
        SignalKind::alarm(),
        SignalKind::io(),
    ]
}

/// Waits for SIGINT or SIGTERM. Until then the ignored signals do nothing.
///
/// # Errors
/// The handlers cannot be installed.
pub async fn interrupted() -> std::io::Result<()> {
    // A stream that nobody reads still takes its signal away from the default.
    let _ignored: Vec<Signal> = ignored().into_iter().map(signal).collect::<Result<_, _>>()?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}
