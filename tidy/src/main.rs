//! `cargo run -p tidy [CHECKOUT]`: prints the counts, and the places that they count.

use std::path::PathBuf;

use tidy::{arrows, items, sources};

fn main() {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let root = std::env::args_os().nth(1).map_or(here, PathBuf::from);
    let sources = sources::read(&root);
    let twice = items::types_defined_twice(&sources);
    let circles = arrows::in_circles(&sources);
    for (name, places) in &twice {
        println!("{name}: {}", places.join(" "));
    }
    for arrow in &circles {
        println!("{} -> {} ({})", arrow.from, arrow.to, arrow.at);
    }
    let [functions, files] = [items::long_functions(&sources), items::long_files(&sources)];
    for (at, what) in functions.iter().chain(&files) {
        println!("{at}: {what}");
    }
    println!("type names defined twice: {}", twice.len());
    println!("modules in circles of imports: {}", arrows::modules_in_circles(&circles).len());
    println!("imports that are part of a circle: {}", circles.len());
    println!("functions over {} lines: {}", items::FUNCTION_LINES_MAX, functions.len());
    println!("files over {} lines: {}", items::FILE_LINES_MAX, files.len());
    println!("files with unsafe code: {}", items::files_with_unsafe_code(&sources).len());
}
