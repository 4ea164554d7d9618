//! What only habit would hold otherwise. Each failure names the places.

use std::path::{Path, PathBuf};
use std::process::Command;

use tidy::items::Finding;
use tidy::sources::{SourceFile, files, read};
use tidy::words::{never_list, uses};
use tidy::{arrows, documents, items};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources() -> Vec<SourceFile> {
    read(&root())
}

/// The only files with unsafe code, each for what safe Rust cannot say: memory that others share, and system calls.
const UNSAFE: &[&str] = &[
    "ft-agent/src/doctor/micro.rs",
    "ft-agent/src/outside/tap.rs",
    "test-and-set/src/time_slice.rs",
    "vmm/soft-cpu/differential/src/native.rs",
    "vmm/soft-cpu/translator/src/lib.rs",
    "vmm/soft-cpu/translator/src/memory.rs",
    "vmm/soft-cpu/translator/src/stubs.rs",
    "vmm/src/ram/mod.rs",
    "vmm/src/vcpu/kvm/fpu.rs",
    "vmm/src/vcpu/kvm/kick.rs",
    "vmm/src/vcpu/kvm/run_area.rs",
    "vmm/src/vcpu/kvm/vm.rs",
    "vmm/src/vcpu/perf/grace.rs",
    "vmm/src/vcpu/perf/mod.rs",
];

/// Longer files that are data, or one thing that reads best in one piece.
const LONG_FILES: &[&str] = &[];

/// Modules that take from each other, and why they must.
const CIRCLES: &[(&str, &str)] = &[
    // A handler is a function of the CPU, and the CPU holds the handler that it has to run again.
    ("vmm/soft-cpu/src/insn", "vmm/soft-cpu/src/state"),
    ("vmm/soft-cpu/src/state", "vmm/soft-cpu/src/insn"),
];

/// The widest line of a document, in columns; tables and code may be wider.
const DOCUMENT_COLUMNS: usize = 120;
/// README is read in one go.
const README_LINES_MAX: usize = 120;

fn text(path: &Path) -> String {
    std::fs::read_to_string(root().join(path)).expect("a file of the checkout")
}

#[track_caller]
fn none(found: &[Finding], rule: &str) {
    let lines: Vec<_> = found.iter().map(|(at, what)| format!("{at}: {what}")).collect();
    assert!(found.is_empty(), "{rule}:\n{}", lines.join("\n"));
}

#[test]
fn a_type_name_means_one_thing() {
    let twice = items::types_defined_twice(&sources());
    let found: Vec<_> = twice.into_iter().map(|(name, places)| (name, places.join(" "))).collect();
    none(&found, "these type names are defined more than once; give each thing a name of its own");
}

#[test]
fn imports_run_in_no_circle() {
    let found: Vec<_> = arrows::in_circles(&sources())
        .into_iter()
        .filter(|a| !CIRCLES.contains(&(&a.from, &a.to)))
        .map(|a| (a.at, format!("{} takes from {}", a.from, a.to)))
        .collect();
    none(&found, "these imports are part of a circle; move what both sides need below them");
}

#[test]
fn functions_and_files_are_short() {
    none(&items::long_functions(&sources()), "these functions are too long; take a part out and name it");
    let mut files = items::long_files(&sources());
    files.retain(|(path, _)| !LONG_FILES.contains(&path.as_str()));
    none(&files, "these files are too long; divide them, or if one is a table name it in LONG_FILES");
}

#[test]
fn unsafe_code_is_where_it_is_known() {
    assert_eq!(items::files_with_unsafe_code(&sources()), UNSAFE);
}

/// `ARCHITECTURE.md` has the list; it, the changelog and this crate must name the words.
#[test]
fn words_of_the_never_list_are_not_used() {
    let list = never_list(&text(Path::new("ARCHITECTURE.md")));
    assert!(list.len() > 10, "ARCHITECTURE.md has no list of words under the heading Never: {list:?}");
    let mut found = Vec::new();
    for source in sources().iter().filter(|s| !s.path.starts_with("tidy")) {
        found.extend(uses(&source.path, &source.text, &list));
    }
    for path in files(&root(), ".md") {
        if path != Path::new("ARCHITECTURE.md") && path != Path::new("CHANGELOG.md") {
            found.extend(uses(&path, &text(&path), &list));
        }
    }
    none(&found, "these words are on ARCHITECTURE.md's never list");
}

#[test]
fn links_lead_somewhere() {
    let mut found = Vec::new();
    let mut web = 0;
    for path in files(&root(), ".md") {
        found.extend(documents::dead_links(&root(), &path, &text(&path)));
        web += documents::web_links(&text(&path));
    }
    none(&found, "these links are dead");
    eprintln!("{web} links to the web were not followed");
}

#[test]
fn documents_are_narrow_and_readme_is_short() {
    let mut found = Vec::new();
    for path in files(&root(), ".md") {
        found.extend(documents::wide_lines(&path, &text(&path), DOCUMENT_COLUMNS));
    }
    none(&found, "these lines are too wide");
    let lines = text(Path::new("README.md")).lines().count();
    assert!(lines <= README_LINES_MAX, "README.md has {lines} lines, at most {README_LINES_MAX} are read");
}

#[test]
fn pictures_are_those_of_their_texts() {
    let checked =
        Command::new(root().join("scripts/pictures")).arg("--check").output().expect("scripts/pictures");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}
