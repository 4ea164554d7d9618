//! Arrows between modules: which module uses which. Among the modules of one folder they must not run in a circle, so
//! that there is an order in which a reader can go through them from the bottom to the top.
//!
//! Arrows to a module's own parent do not count: the parent has what a folder's modules share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proc_macro2::TokenTree;
use syn::visit::{self, Visit};

use crate::sources::{SourceFile, flat, is_cfg_test};

type ModulePath = Vec<String>;

/// An arrow between two modules with the same parent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrow {
    /// The module that uses the other, with its crate and parents.
    pub from: String,
    /// The module that it uses.
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
    /// Names of its own items.
    defined: BTreeSet<String>,
    /// Names that it imports, with their paths. Private ones count: the modules inside it may use them.
    imported: BTreeMap<String, Vec<String>>,
    /// Paths of which it imports every name.
    globs: Vec<Vec<String>>,
}

/// Where a path leads.
enum Place {
    Module(ModulePath),
    /// An item of this module.
    ItemOf(ModulePath),
}

/// How many imports are followed one after another.
const IMPORTS_MAX: usize = 8;

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

/// Modules that are part of a circle of arrows.
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
        let mut module =
            Module { source, items, defined: BTreeSet::new(), imported: BTreeMap::new(), globs: Vec::new() };
        for item in items {
            match item {
                syn::Item::Mod(inner) if !is_cfg_test(&inner.attrs) => {
                    let name = inner.ident.to_string();
                    let below = folder.join(&name);
                    let inner_path = [path.clone(), vec![name]].concat();
                    if let Some((_, items)) = &inner.content {
                        self.add(inner_path, source, items, &below, files);
                    } else {
                        let file = module_file(inner, source, &below, files);
                        self.add(inner_path, file, &file.syntax.items, &below, files);
                    }
                }
                syn::Item::Use(import) => {
                    for (path, name) in flatten(&import.tree) {
                        match name {
                            Some(name) => drop(module.imported.insert(name, path)),
                            None => module.globs.push(path),
                        }
                    }
                }
                item => module.defined.extend(item_name(item).map(ToString::to_string)),
            }
        }
        self.modules.insert(path, module);
    }

    /// Where a path written in module `here` leads. An unknown item, for example one that a macro makes, counts as an
    /// item of the last module on the path.
    fn resolve(&self, here: &[String], path: &[String], imports: usize) -> Option<Place> {
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Vec::new(),
            "self" => here.to_vec(),
            "super" => here.split_last()?.1.to_vec(),
            _ => {
                rest = path;
                here.to_vec()
            }
        };
        while let Some((name, further)) = rest.split_first() {
            match self.find(&at, name, imports) {
                Some(Place::Module(inner)) => (at, rest) = (inner, further),
                Some(item) => return Some(item),
                None => return Some(Place::ItemOf(at)),
            }
        }
        Some(Place::Module(at))
    }

    /// What a name means in module `at`.
    fn find(&self, at: &[String], name: &str, imports: usize) -> Option<Place> {
        if name == "super" {
            return Some(Place::Module(at.split_last()?.1.to_vec()));
        }
        let inner = [at, &[name.to_owned()]].concat();
        if self.modules.contains_key(&inner) {
            return Some(Place::Module(inner));
        }
        let module = &self.modules[at];
        if module.defined.contains(name) {
            return Some(Place::ItemOf(at.to_vec()));
        }
        if imports == IMPORTS_MAX {
            return None;
        }
        if let Some(path) = module.imported.get(name) {
            return self.resolve(at, path, imports + 1);
        }
        module.globs.iter().find_map(|glob| match self.resolve(at, glob, imports + 1)? {
            Place::Module(from) => self.find(&from, name, imports + 1),
            Place::ItemOf(_) => None,
        })
    }

    /// The arrows between modules with the same parent, by that parent: from, to, and where.
    fn arrows(&self) -> BTreeMap<ModulePath, BTreeMap<(String, String), String>> {
        let mut arrows = BTreeMap::<_, BTreeMap<_, _>>::new();
        for (here, module) in &self.modules {
            let mut paths = Paths::default();
            let items = module.items.iter().filter(|item| !matches!(item, syn::Item::Mod(_)));
            items.for_each(|item| paths.visit_item(item));
            for (path, line) in paths.found {
                let Some(Place::Module(to) | Place::ItemOf(to)) = self.resolve(here, &path, 0) else {
                    continue;
                };
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

/// The file of a module that has its own.
///
/// # Panics
/// The file is not found, so the module's imports would not be seen.
fn module_file<'a>(
    module: &syn::ItemMod,
    parent: &SourceFile,
    below: &Path,
    files: &BTreeMap<&Path, &'a SourceFile>,
) -> &'a SourceFile {
    let [beside, inside] = [below.with_extension("rs"), below.join("mod.rs")];
    let file = files.get(beside.as_path()).or_else(|| files.get(inside.as_path()));
    let line = module.ident.span().start().line;
    file.unwrap_or_else(|| panic!("{}: the file of module {} is not found", parent.at(line), module.ident))
}

fn item_name(item: &syn::Item) -> Option<&syn::Ident> {
    Some(match item {
        syn::Item::Const(i) => &i.ident,
        syn::Item::Enum(i) => &i.ident,
        syn::Item::Fn(i) => &i.sig.ident,
        syn::Item::Static(i) => &i.ident,
        syn::Item::Struct(i) => &i.ident,
        syn::Item::Trait(i) => &i.ident,
        syn::Item::Type(i) => &i.ident,
        syn::Item::Union(i) => &i.ident,
        _ => return None,
    })
}

/// The paths of a `use`, each with the name that it imports. A path without one imports every name.
fn flatten(tree: &syn::UseTree) -> Vec<(Vec<String>, Option<String>)> {
    let one = |path: &syn::Ident, name: &syn::Ident| (vec![path.to_string()], Some(name.to_string()));
    match tree {
        syn::UseTree::Path(before) => {
            let before_self = |(path, name): (Vec<String>, Option<String>)| match path[..] == ["self"] {
                true if name.as_deref() == Some("self") => (Vec::new(), Some(before.ident.to_string())),
                true => (Vec::new(), name),
                false => (path, name),
            };
            let after = flatten(&before.tree).into_iter().map(before_self);
            after.map(|(path, name)| ([vec![before.ident.to_string()], path].concat(), name)).collect()
        }
        syn::UseTree::Name(name) => vec![one(&name.ident, &name.ident)],
        syn::UseTree::Rename(name) => vec![one(&name.ident, &name.rename)],
        syn::UseTree::Glob(_) => vec![(Vec::new(), None)],
        syn::UseTree::Group(group) => group.items.iter().flat_map(flatten).collect(),
    }
}

/// Collects the paths that items name and the macros that they call, with their lines, also in the tokens of macros.
#[derive(Default)]
pub struct Paths {
    /// Paths, also those of one name.
    pub found: Vec<(Vec<String>, usize)>,
    /// Names of macros.
    pub macros: Vec<(String, usize)>,
}

impl Paths {
    fn add_macro(&mut self) {
        let last = self.found.last().and_then(|(path, line)| Some((path.last()?.clone(), *line)));
        self.macros.extend(last);
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, import: &'ast syn::ItemUse) {
        let line = import.use_token.span.start().line;
        self.found.extend(flatten(&import.tree).into_iter().map(|(path, _)| (path, line)));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let line = path.segments[0].ident.span().start().line;
        self.found.push((path.segments.iter().map(|s| s.ident.to_string()).collect(), line));
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        self.visit_path(&called.path);
        self.add_macro();
        // Of `a::b`, `:` and `:` come between the names.
        let mut between = Vec::new();
        for token in flat(called.tokens.clone()) {
            match token {
                TokenTree::Ident(name) => {
                    match self.found.last_mut() {
                        Some((path, _)) if between == [':', ':'] => path.push(name.to_string()),
                        _ => self.found.push((vec![name.to_string()], name.span().start().line)),
                    }
                    between.clear();
                }
                TokenTree::Punct(mark) => {
                    if mark.as_char() == '!' && between.is_empty() {
                        self.add_macro();
                    }
                    between.push(mark.as_char());
                }
                _ => between.push(' '),
            }
        }
    }

    /// A visibility (`pub(in crate::x)`) uses nothing.
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

    /// How many arrows are in circles if `a` has this text, and `b` uses `a`.
    fn arrows_back(root: &str, a: &str) -> usize {
        let root = format!("mod a; mod b; {root}");
        let b = "pub fn g() { crate::a::f() } pub struct Thing; pub mod inner { pub struct Deep; }";
        let sources = [source("x/src/lib.rs", &root), source("x/src/a.rs", a), source("x/src/b.rs", b)];
        in_circles(&sources).len()
    }

    #[test]
    fn every_way_to_name_a_module_beside_is_found() {
        let ways = [
            ("", "fn f() { crate::b::g() }"),
            ("", "use crate::b as y;"),
            ("", "use crate::{b::{self}};"),
            ("", "use super::*; fn f() { b::g() }"),
            ("", "use crate as y; fn f() { y::b::g() }"),
            ("", "use super::{self as y}; fn f() { y::b::g() }"),
            ("use b::Thing;", "use super::Thing;"),
            ("use b::Thing as Other;", "fn f(_: super::Other) {}"),
            ("use b::Thing;", "use super::*; fn f(_: Thing) {}"),
            ("pub use b::*;", "use crate::Thing;"),
            ("pub use b::inner;", "use crate::inner::Deep;"),
            ("", "fn f() { assert!(crate::b::g()) }"),
            ("", "macro_rules! m { () => { $crate::b::g() } }"),
            ("", "mod more { mod most { fn f() { super::super::super::b::g() } } }"),
        ];
        for (root, a) in ways {
            assert_eq!(arrows_back(root, a), 2, "{root} {a}");
        }
        let others = [
            ("pub use b::Thing;", "struct Thing; fn f(_: Thing) {}"),
            ("", "use std::b::g; fn f() { x!(a, b) }"),
            ("", "#[cfg(test)] mod tests { use crate::b::g; }"),
        ];
        for (root, a) in others {
            assert_eq!(arrows_back(root, a), 0, "{root} {a}");
        }
    }

    #[test]
    #[should_panic(expected = "x/src/lib.rs:1: the file of module b is not found")]
    fn a_module_without_a_file_is_an_error() {
        in_circles(&[source("x/src/lib.rs", "#[path = \"c.rs\"] mod b;"), source("x/src/c.rs", "")]);
    }
}
