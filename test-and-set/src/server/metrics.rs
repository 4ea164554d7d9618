//! `GET /metrics` for Prometheus, over plain HTTP on an address of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

use crate::pending::PendingPlaces;
use crate::server::node::Node;

/// The largest number of scrapes at once; one more closes another, as [`PendingPlaces`] says.
const SCRAPES_MAX: usize = 8;
const REQUEST_BYTES_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers scrapes for ever.
pub async fn serve(node: Arc<Node>, listener: TcpListener) {
    let mut scrapes: PendingPlaces<AbortHandle> = PendingPlaces::new(SCRAPES_MAX);
    loop {
        let Ok((tcp, from)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        scrapes.retain(|scrape| !scrape.is_finished());
        let node = node.clone();
        let scrape = tokio::spawn(async move {
            // Prometheus repeats a scrape that fails.
            tokio::time::timeout(PATIENCE, answer(&node, tcp)).await.ok();
        });
        if let (_, Some(closed)) = scrapes.give(Some(from.ip()), scrape.abort_handle()) {
            closed.abort();
        }
    }
}

async fn answer(node: &Node, mut tcp: TcpStream) -> std::io::Result<()> {
    let mut request = vec![];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        if request.len() > REQUEST_BYTES_MAX || tcp.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") {
        let (free, used) = node.disk.space();
        ("200 OK", node.stats.prometheus(&node.raft.view(), free, used))
    } else {
        ("404 Not Found", "this address serves only GET /metrics\n".into())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    tcp.write_all(head.as_bytes()).await?;
    tcp.write_all(body.as_bytes()).await?;
    tcp.shutdown().await
}
