//! The files of a checkout that git tracks, or would if they were added.

use std::path::{Path, PathBuf};
use std::process::Command;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::Visit;

use crate::Finding;

/// A Rust file.
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
    ///
    /// In `src` these are the modules named `tests`, `..._tests` and `..._test`; [`ungated_tests`] sees to it that no
    /// program has them.
    pub fn is_test(&self) -> bool {
        let parts: Vec<_> = self.path.iter().map(|part| part.to_string_lossy()).collect();
        let folders = parts.iter().rev().skip(1);
        let in_program = folders.clone().any(|folder| folder == "src");
        let others = ["benches", "examples", "targets"];
        let is_test_folder = |name: &str| name == "tests" || !in_program && others.contains(&name);
        self.path.file_stem().is_some_and(|stem| names_tests(&stem.to_string_lossy()))
            || folders.into_iter().any(|folder| is_test_folder(folder))
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

/// The files of the checkout at `root` whose names have this ending.
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

/// Every Rust file in the checkout at `root`.
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

fn names_tests(module: &str) -> bool {
    module == "tests" || module.ends_with("_tests") || module.ends_with("_test")
}

/// Modules in `src` that are named as tests and are compiled into a program.
pub fn ungated_tests(sources: &[SourceFile]) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| s.path.iter().any(|part| part == "src") && !s.is_test()) {
        for item in &source.syntax.items {
            if let syn::Item::Mod(module) = item
                && names_tests(&module.ident.to_string())
                && !is_cfg_test(&module.attrs)
            {
                let at = source.at(module.ident.span().start().line);
                found.push((at, format!("{} is not under cfg(test)", module.ident)));
            }
        }
    }
    found
}

/// The tokens of a macro without brackets: what is inside them comes in their place.
pub fn flat(tokens: TokenStream) -> Vec<TokenTree> {
    let mut all = Vec::new();
    for token in tokens {
        match token {
            TokenTree::Group(group) => all.extend(flat(group.stream())),
            other => all.push(other),
        }
    }
    all
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
