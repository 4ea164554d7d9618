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
    ($($target:ident),*) => {
        const TARGETS: &[&str] = &[$(stringify!($target)),*];
        $(
            #[test]
            fn $target() {
                replay(stringify!($target), fuzz::$target);
            }
        )*
    };
}

corpora!(boot, channel, log, virtio_blk, virtio_console, virtio_net, virtio_rng);

/// A target that has no program, or whose corpus is not replayed, would not be noticed otherwise.
#[test]
fn each_target_has_a_program_and_a_corpus() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let names = |folder: &str, ending: &str| {
        let files = std::fs::read_dir(here.join(folder)).expect("a folder");
        let files =
            files.map(|file| file.expect("a file").file_name().into_string().expect("a name in UTF-8"));
        let mut names: Vec<_> =
            files.filter_map(|name| Some(name.strip_suffix(ending)?.to_owned())).collect();
        names.sort();
        names
    };
    let manifest = std::fs::read_to_string(here.join("Cargo.toml")).expect("Cargo.toml");
    let programs = manifest.split("[[bin]]\nname = \"").skip(1);
    let mut programs: Vec<_> = programs.filter_map(|rest| rest.split('"').next()).collect();
    programs.sort();
    assert_eq!(names("targets", ".rs"), TARGETS);
    assert_eq!(names("corpus", ".tar.gz"), TARGETS);
    assert_eq!(programs, TARGETS);
}
