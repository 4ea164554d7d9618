//! The files of a checkout that git tracks, or would if they were added.

use std::path::{Path, PathBuf};
use std::process::Command;

use syn::visit::Visit;

/// A file of Rust.
pub struct SourceFile {
    /// Relative to the checkout.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// Its syntax.
    pub syntax: syn::File,
}

impl SourceFile {
    /// Tests, benchmarks, examples and fuzz targets: they may repeat the names of what they are about.
    pub fn is_test(&self) -> bool {
        let path = self.path.to_string_lossy();
        let folder = |name: &str| path.split('/').any(|part| part == name);
        ["tests", "benches", "examples", "targets"].into_iter().any(folder)
            || path.ends_with("tests.rs")
            || path.ends_with("_test.rs")
    }

    /// The bare-metal guest is another program, for another machine.
    pub fn is_guest(&self) -> bool {
        self.path.starts_with("guest-images")
    }

    /// The name of the file and a line in it, as compilers print it.
    pub fn at(&self, line: usize) -> String {
        format!("{}:{line}", self.path.display())
    }
}

/// The files of the checkout at `root` whose names end so.
///
/// # Panics
/// Git does not answer.
pub fn files(root: &Path, ending: &str) -> Vec<PathBuf> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root)
        .output()
        .expect("git must be installed");
    assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout).expect("file names in UTF-8");
    let exists = |name: &&str| name.ends_with(ending) && root.join(name).is_file();
    listed.split('\0').filter(exists).map(PathBuf::from).collect()
}

/// Every file of Rust in the checkout at `root`.
///
/// # Panics
/// One cannot be read, or is not Rust.
pub fn read(root: &Path) -> Vec<SourceFile> {
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(root.join(&path)).expect("a file of the checkout");
        let syntax = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        SourceFile { path, text, syntax }
    };
    files(root, ".rs").into_iter().map(read).collect()
}

/// Whether an item is compiled for tests only.
pub fn is_cfg_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Ident>().is_ok_and(|condition| condition == "test")
    })
}

/// Visits a file without what is compiled for tests only.
pub struct WithoutTests<V>(pub V);

impl<'ast, V: Visit<'ast>> WithoutTests<V> {
    /// Visits the items of a file.
    pub fn run(mut self, file: &'ast syn::File) -> V {
        for item in &file.items {
            if let syn::Item::Mod(module) = item
                && is_cfg_test(&module.attrs)
            {
                continue;
            }
            self.0.visit_item(item);
        }
        self.0
    }
}
