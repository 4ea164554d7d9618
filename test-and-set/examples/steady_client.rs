//! `steady_client URL NAME` uses a store until its standard input ends: the client of another build in tests of upgrades.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

#[path = "../tests/support/steady.rs"]
mod steady;

fn main() -> Result<(), String> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [url, name] = &arguments[..] else { return Err("give a store's URL and a name".into()) };
    let url = url.parse().map_err(|e| format!("{url}: {e}"))?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    std::thread::spawn(move || {
        // However it ends, nobody waits any longer.
        std::io::stdin().read_to_end(&mut vec![]).ok();
        stopped.store(true, Relaxed);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| e.to_string())?.block_on(async {
        let store = test_and_set::connect(&url).map_err(|e| e.to_string())?;
        println!("{}", steady::use_store(&*store, name, &stop).await?);
        Ok(())
    })
}
