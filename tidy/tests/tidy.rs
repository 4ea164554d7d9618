//! Checks of what would otherwise be only habit. Each failure names the places.

use std::path::{Path, PathBuf};
use std::process::Command;

use tidy::sources::{SourceFile, files, read, ungated_tests};
use tidy::words::{never_list, uses};
use tidy::{Finding, arrows, crates, documents, items, pure};

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

/// The workspace's crates, from the bottom to the top, and which others of the workspace each may depend on. Tests may
/// depend on others, too.
const CRATES: &[(&str, &[&str])] = &[
    ("entry", &[]),
    ("host-log", &[]),
    ("store-rule", &[]),
    ("soft-cpu", &[]),
    ("bench", &[]),
    ("tidy", &[]),
    ("logging-channel", &["entry"]),
    ("agent", &["entry", "logging-channel", "store-rule"]),
    ("translator", &["soft-cpu"]),
    ("differential", &["soft-cpu", "translator"]),
    ("vmm", &["entry", "soft-cpu", "translator"]),
    ("test-and-set", &["host-log", "store-rule"]),
    ("fuzz", &["entry", "logging-channel", "vmm"]),
    ("ft-agent", &["agent", "bench", "entry", "host-log", "logging-channel", "test-and-set", "vmm"]),
];

/// What crates without any system calls may have from crates.io.
const FROM_CRATES_IO: &[(&str, &[&str])] = &[
    ("agent", &["thiserror"]),
    ("entry", &["crc32fast", "thiserror"]),
    ("logging-channel", &["thiserror"]),
    ("soft-cpu", &["iced-x86", "serde"]),
    ("store-rule", &["rand", "serde", "thiserror"]),
];

/// Folders of the crates that read no clock, socket or file, and print nothing.
const PURE: &[&str] = &[
    "ft-agent/agent",
    "logging-channel",
    "logging-channel/entry",
    "test-and-set/store-rule",
    "vmm",
    "vmm/soft-cpu",
    "vmm/soft-cpu/translator",
];

/// Code that no release build has: where it is, a function or module of it, and the condition that it is compiled under.
const NOT_RELEASED: &[(&str, &str, &str)] = &[
    ("ft-agent/agent/src", "ablation", "feature = \"ablation\""),
    ("logging-channel/src", "hold_unlogged", "feature = \"ablation\""),
    ("logging-channel/src", "next_version", "feature = \"next-version\""),
    ("test-and-set/src", "next_version", "feature = \"next-version\""),
    ("ft-agent/src/failpoint.rs", "enabled", "debug_assertions"),
    ("test-and-set/src/server/left_out.rs", "something", "debug_assertions"),
];

/// The widest line of a document, in columns; tables may be wider.
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
    for path in files(&root(), "") {
        let names_them = ["ARCHITECTURE.md", "CHANGELOG.md", "tidy"].iter().any(|p| path.starts_with(p));
        // What is not text is a golden file, or an archive.
        if !names_them && let Ok(text) = std::fs::read_to_string(root().join(&path)) {
            found.extend(uses(&path, &text, &list));
        }
    }
    none(&found, "these words are on ARCHITECTURE.md's never list");
}

#[test]
fn links_lead_somewhere() {
    let mut found = Vec::new();
    let mut web = 0;
    let all = files(&root(), "");
    for path in files(&root(), ".md") {
        found.extend(documents::dead_links(&root(), &all, &path, &text(&path)));
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
    assert!(
        lines <= README_LINES_MAX,
        "README.md has {lines} lines, but at most {README_LINES_MAX} are allowed: move something to docs/"
    );
}

#[test]
fn pictures_are_those_of_their_texts() {
    let checked =
        Command::new(root().join("scripts/pictures")).arg("--check").output().expect("scripts/pictures");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    for picture in files(&root().join("docs"), ".svg") {
        let text = root().join("docs").join(&picture).with_extension("dot");
        assert!(text.exists(), "docs/{} has no text from which scripts/pictures makes it", picture.display());
    }
}

/// Manifests of the workspace: path, text, and the package's name.
fn manifests() -> Vec<(PathBuf, String, String)> {
    let ours = files(&root(), "Cargo.toml").into_iter().filter(|path| !path.starts_with("guest-images"));
    ours.map(|path| {
        let text = text(&path);
        let name = crates::name(&text).unwrap_or_default().to_owned();
        (path, text, name)
    })
    .collect()
}

#[test]
fn crates_depend_on_crates_below_them() {
    let allowed = |table: &[(&str, &'static [&str])], name: &str| {
        table.iter().find(|(other, _)| *other == name).map(|(_, allowed)| *allowed)
    };
    let mut found = Vec::new();
    let mut crates_seen = 0;
    for (path, text, name) in manifests().iter().filter(|(_, _, name)| !name.is_empty()) {
        let Some(below) = allowed(CRATES, name) else {
            panic!("crate {name} has no row in the table CRATES")
        };
        crates_seen += 1;
        for dependency in crates::dependencies(text).iter().filter(|d| !d.is_for_tests()) {
            let ok = match allowed(CRATES, &dependency.name) {
                Some(_) => below.contains(&dependency.name.as_str()),
                None => {
                    allowed(FROM_CRATES_IO, name).is_none_or(|all| all.contains(&dependency.name.as_str()))
                }
            };
            if !ok {
                found.push((format!("{}:{}", path.display(), dependency.line), dependency.name.clone()));
            }
        }
    }
    none(&found, "these crates must not be dependencies here (the tables are in tidy/tests/tidy.rs)");
    assert_eq!(crates_seen, CRATES.len(), "the table CRATES has rows of crates that do not exist");
    for (n, (name, below)) in CRATES.iter().enumerate() {
        let is_below = |other: &&str| CRATES[..n].iter().any(|(name, _)| name == other);
        assert!(below.iter().all(is_below), "in the table CRATES {name} is not above what it depends on");
    }
}

#[test]
fn pure_crates_have_no_input_and_output() {
    none(&pure::input_and_output(&sources(), PURE), "these crates must be pure");
    let lints = text(Path::new("vmm/clippy.toml"));
    for folder in PURE {
        let nearest =
            Path::new(folder).ancestors().map(|f| f.join("clippy.toml")).find(|f| root().join(f).exists());
        let nearest = nearest.unwrap_or_else(|| panic!("{folder} has no clippy.toml"));
        assert_eq!(text(&nearest), lints, "{} differs from vmm/clippy.toml", nearest.display());
    }
}

/// The binaries get every rule of the agent, and no failpoints.
#[test]
fn what_only_tests_may_do_is_not_in_a_release_build() {
    let mut found = Vec::new();
    for (path, text, _) in manifests() {
        for feature in ["ablation", "next-version"] {
            found.extend(crates::gives_feature(&path, &text, feature));
        }
    }
    none(&found, "a program would have a feature that is for tests only");
    let sources = sources();
    for (place, name, condition) in NOT_RELEASED {
        found.extend(items::ungated(&sources, place, name, condition));
    }
    none(&found, "a release build would have this");
    let arms = sources
        .iter()
        .filter(|s| !s.is_test() && s.text.contains("VMFT_FAILPOINT") && !s.path.starts_with("tidy"));
    let arms: Vec<_> = arms.map(|s| s.path.display().to_string()).collect();
    assert_eq!(arms, ["ft-agent/src/failpoint.rs"], "failpoints are armed elsewhere");
    none(&ungated_tests(&sources), "these modules are named as tests and are part of a program");
}

#[test]
fn the_minimum_rust_version_is_the_one_that_is_checked() {
    let minimum = text(Path::new("Cargo.toml"))
        .lines()
        .find_map(|l| crates::value(l, "rust-version").map(String::from));
    let toolchain = text(Path::new("rust-toolchain.toml"))
        .lines()
        .find_map(|l| crates::value(l, "channel").map(String::from));
    let (minimum, toolchain) = (minimum.expect("a rust-version"), toolchain.expect("a channel"));
    assert!(
        toolchain == minimum || toolchain.starts_with(&format!("{minimum}.")),
        "{toolchain} is not {minimum}"
    );
}
