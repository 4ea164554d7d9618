//! Each fuzz target's corpus is an ordinary test: what the fuzzers have found stays found.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;

/// Calls the target with each file of its corpus.
fn replay(name: &str, target: fn(&[u8])) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(format!("{name}.tar.gz"));
    let file = File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut archive = tar::Archive::new(GzDecoder::new(file));
    let mut inputs = 0;
    for entry in archive.entries().expect("the archive cannot be read") {
        let mut entry = entry.expect("the archive is damaged");
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let mut data = Vec::new();
        entry.read_to_end(&mut data).expect("the archive is damaged");
        // A failure names its input, so that it can be run alone.
        eprintln!("{name}: {}", entry.path().expect("a name in UTF-8").display());
        target(&data);
        inputs += 1;
    }
    assert!(inputs > 0, "{} is empty", path.display());
}

macro_rules! corpora {
    ($($target:ident),*) => { $(
        #[test]
        fn $target() {
            replay(stringify!($target), fuzz::$target);
        }
    )* };
}

corpora!(boot, channel, log, virtio_blk, virtio_console, virtio_net, virtio_rng);
