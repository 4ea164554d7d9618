//! Arrows between modules: which takes from which. Among the modules of one folder they must not run in a circle, so
//! that there is an order in which a reader can go through them from the bottom to the top.
//!
//! A module's own parent does not count: what a folder's modules share stands there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

use crate::sources::{SourceFile, is_cfg_test};

type ModulePath = Vec<String>;

/// An arrow between two modules that stand beside each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrow {
    /// The module that takes, with its crate and parents.
    pub from: String,
    /// The module that it takes from.
    pub to: String,
    /// The first place where it does.
    pub at: String,
}

/// The modules of one crate.
struct Crate<'a> {
    /// The root file, which names the crate.
    root: PathBuf,
    /// Modules by their path from the root.
    modules: BTreeMap<ModulePath, Module<'a>>,
}

/// A module, in a file of its own or inside another's.
struct Module<'a> {
    source: &'a SourceFile,
    items: &'a [syn::Item],
    /// Names that it passes on from elsewhere (`pub use`), with their paths.
    passed_on: BTreeMap<String, Vec<String>>,
}

/// Every arrow that is part of a circle, sorted.
pub fn in_circles(sources: &[SourceFile]) -> Vec<Arrow> {
    let by_path: BTreeMap<&Path, &SourceFile> = sources.iter().map(|s| (s.path.as_path(), s)).collect();
    let mut all = Vec::new();
    for source in sources.iter().filter(|s| is_root(&s.path)) {
        all.extend(Crate::read(source, &by_path).circles());
    }
    all.sort();
    all
}

/// Modules that stand in a circle of arrows.
pub fn modules_in_circles(arrows: &[Arrow]) -> BTreeSet<&str> {
    arrows.iter().map(|a| a.from.as_str()).collect()
}

fn is_root(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.ends_with("src/lib.rs") || text.ends_with("src/main.rs") || text.contains("src/bin/")
}

impl<'a> Crate<'a> {
    fn read(root: &'a SourceFile, files: &BTreeMap<&Path, &'a SourceFile>) -> Crate<'a> {
        let mut krate = Crate { root: root.path.clone(), modules: BTreeMap::new() };
        let folder = root.path.parent().unwrap_or(Path::new("")).to_owned();
        krate.add(Vec::new(), root, &root.syntax.items, &folder, files);
        krate
    }

    /// Adds a module and those inside it. `folder` is where the files of its modules are.
    fn add(
        &mut self,
        path: ModulePath,
        source: &'a SourceFile,
        items: &'a [syn::Item],
        folder: &Path,
        files: &BTreeMap<&Path, &'a SourceFile>,
    ) {
        let mut passed_on = BTreeMap::new();
        for item in items {
            match item {
                syn::Item::Mod(module) if !is_cfg_test(&module.attrs) => {
                    let name = module.ident.to_string();
                    let inner = [path.clone(), vec![name.clone()]].concat();
                    let below = folder.join(&name);
                    if let Some((_, items)) = &module.content {
                        self.add(inner, source, items, &below, files);
                    } else {
                        let [beside, inside] = [below.with_extension("rs"), below.join("mod.rs")];
                        let file = files.get(beside.as_path()).or_else(|| files.get(inside.as_path()));
                        if let Some(file) = file {
                            self.add(inner, file, &file.syntax.items, &below, files);
                        }
                    }
                }
                syn::Item::Use(import) if !matches!(import.vis, syn::Visibility::Inherited) => {
                    let mut paths = Vec::new();
                    flatten(&import.tree, &mut Vec::new(), &mut paths);
                    for (path, name) in paths {
                        passed_on.insert(name, path);
                    }
                }
                _ => {}
            }
        }
        self.modules.insert(path, Module { source, items, passed_on });
    }

    /// The module that a path written in module `here` leads to.
    fn resolve(&self, here: &[String], path: &[String], depth: usize) -> Option<ModulePath> {
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Vec::new(),
            "self" => here.to_vec(),
            "super" => here.split_last()?.1.to_vec(),
            name => {
                let inner = [here, &[name.to_owned()]].concat();
                self.modules.contains_key(&inner).then_some(inner)?
            }
        };
        while let Some((name, further)) = rest.split_first() {
            let inner = if name == "super" {
                at.split_last()?.1.to_vec()
            } else {
                [&at[..], std::slice::from_ref(name)].concat()
            };
            if !self.modules.contains_key(&inner) {
                break;
            }
            (at, rest) = (inner, further);
        }
        if let Some(path) = rest.first().and_then(|name| self.modules[&at].passed_on.get(name))
            && depth < 8
        {
            return self.resolve(&at, path, depth + 1).or(Some(at));
        }
        Some(at)
    }

    /// The arrows between modules that stand beside each other, by their parent: from, to, and where.
    fn arrows(&self) -> BTreeMap<ModulePath, BTreeMap<(String, String), String>> {
        let mut arrows = BTreeMap::<_, BTreeMap<_, _>>::new();
        for (here, module) in &self.modules {
            let mut paths = Paths::default();
            module.items.iter().for_each(|item| paths.visit_item(item));
            for (path, line) in paths.found {
                let Some(to) = self.resolve(here, &path, 0) else { continue };
                let shared = here.iter().zip(&to).take_while(|(a, b)| a == b).count();
                if let (Some(from), Some(to)) = (here.get(shared), to.get(shared)) {
                    let beside: &mut BTreeMap<_, _> = arrows.entry(here[..shared].to_vec()).or_default();
                    beside.entry((from.clone(), to.clone())).or_insert_with(|| module.source.at(line));
                }
            }
        }
        arrows
    }

    fn circles(&self) -> Vec<Arrow> {
        let mut circles = Vec::new();
        for (parent, arrows) in self.arrows() {
            let name = |module: &String| {
                let place = self.root.parent().unwrap_or(Path::new("")).display().to_string();
                [&[place], &parent[..], std::slice::from_ref(module)].concat().join("/")
            };
            for ((from, to), at) in &arrows {
                if reaches(to, from, arrows.keys()) {
                    circles.push(Arrow { from: name(from), to: name(to), at: at.clone() });
                }
            }
        }
        circles
    }
}

/// Whether arrows lead from one module to another.
fn reaches<'a>(from: &str, to: &str, arrows: impl Iterator<Item = &'a (String, String)> + Clone) -> bool {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(module) = open.pop() {
        if module == to {
            return true;
        }
        if seen.insert(module) {
            open.extend(arrows.clone().filter(|(f, _)| f == module).map(|(_, to)| to.as_str()));
        }
    }
    false
}

/// The paths of a `use`, each with the name that it gives.
fn flatten(tree: &syn::UseTree, before: &mut Vec<String>, paths: &mut Vec<(Vec<String>, String)>) {
    let whole = |last: &syn::Ident| [&before[..], &[last.to_string()]].concat();
    match tree {
        syn::UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, before, paths);
            before.pop();
        }
        syn::UseTree::Name(name) => paths.push((whole(&name.ident), name.ident.to_string())),
        syn::UseTree::Rename(name) => paths.push((whole(&name.ident), name.rename.to_string())),
        syn::UseTree::Glob(_) => paths.push((before.clone(), "*".into())),
        syn::UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, before, paths)),
    }
}

/// Collects the paths that a module's items name, with their lines; modules inside it are visited by themselves.
#[derive(Default)]
struct Paths {
    found: Vec<(Vec<String>, usize)>,
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, _: &'ast syn::ItemMod) {}

    fn visit_item_use(&mut self, import: &'ast syn::ItemUse) {
        let line = import.use_token.span.start().line;
        let mut paths = Vec::new();
        flatten(&import.tree, &mut Vec::new(), &mut paths);
        self.found.extend(paths.into_iter().map(|(path, _)| (path, line)));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            let line = path.segments[0].ident.span().start().line;
            self.found.push((path.segments.iter().map(|s| s.ident.to_string()).collect(), line));
        }
        visit::visit_path(self, path);
    }

    /// A visibility (`pub(in crate::x)`) takes nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> SourceFile {
        SourceFile { path: path.into(), text: text.into(), syntax: syn::parse_file(text).expect("Rust") }
    }

    #[test]
    fn a_circle_is_found_through_names_that_are_passed_on() {
        let sources = [
            source("x/src/lib.rs", "mod a;\nmod b;\nmod c;\npub use b::Thing;"),
            source("x/src/a.rs", "use crate::Thing;\nfn f() { super::c::g() }"),
            source("x/src/b.rs", "pub struct Thing;\nfn f() { crate::a::f() }"),
            source("x/src/c.rs", "pub fn g() {}"),
        ];
        let arrows = in_circles(&sources);
        let names: Vec<_> = arrows.iter().map(|a| (a.from.as_str(), a.to.as_str(), a.at.as_str())).collect();
        assert_eq!(names, [("x/src/a", "x/src/b", "x/src/a.rs:1"), ("x/src/b", "x/src/a", "x/src/b.rs:2")]);
        assert_eq!(modules_in_circles(&arrows).len(), 2);
    }
}
