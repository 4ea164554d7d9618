//! Types, functions, unsafe code.

use std::collections::BTreeMap;

use proc_macro2::{Ident, TokenTree};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::Finding;
use crate::sources::{SourceFile, WithoutTests, flat};

/// Lines of a function, from its signature to its closing brace, beyond which it is long.
pub const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file beyond which it is long.
pub const FILE_LINES_MAX: usize = 500;

/// Type names (struct, enum, union, trait, alias) that are defined more than once, with the places of their definitions.
pub fn types_defined_twice(sources: &[SourceFile]) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::<String, Vec<String>>::new();
    for source in sources.iter().filter(|s| !s.is_test() && !s.is_guest()) {
        let types = WithoutTests(Types::default()).run(&source.syntax).found;
        for (name, line) in types {
            all.entry(name).or_default().push(source.at(line));
        }
    }
    all.retain(|_, places| places.len() > 1);
    all
}

#[derive(Default)]
struct Types {
    found: Vec<(String, usize)>,
}

impl Types {
    fn add(&mut self, name: &syn::Ident) {
        self.found.push((name.to_string(), name.span().start().line));
    }
}

impl<'ast> Visit<'ast> for Types {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        match item {
            syn::Item::Struct(i) => self.add(&i.ident),
            syn::Item::Enum(i) => self.add(&i.ident),
            syn::Item::Union(i) => self.add(&i.ident),
            syn::Item::Trait(i) => self.add(&i.ident),
            syn::Item::Type(i) => self.add(&i.ident),
            _ => {}
        }
        visit::visit_item(self, item);
    }

    /// In a macro a type is a keyword and a name. Aliases are not told from associated types, and do not count.
    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        for pair in flat(called.tokens.clone()).windows(2) {
            if let [TokenTree::Ident(keyword), TokenTree::Ident(name)] = pair
                && ["struct", "enum", "union", "trait"].iter().any(|k| keyword == k)
            {
                self.add(name);
            }
        }
    }
}

/// Functions that are longer than [`FUNCTION_LINES_MAX`].
pub fn long_functions(sources: &[SourceFile]) -> Vec<Finding> {
    let mut long = Vec::new();
    for source in sources {
        let mut functions = Functions::default();
        functions.visit_file(&source.syntax);
        for (name, first, last) in functions.found {
            let lines = last + 1 - first;
            if lines > FUNCTION_LINES_MAX {
                long.push((source.at(first), format!("{name} has {lines} lines")));
            }
        }
    }
    long
}

#[derive(Default)]
struct Functions {
    found: Vec<(String, usize, usize)>,
}

impl Functions {
    fn add(&mut self, signature: &syn::Signature, end: proc_macro2::Span) {
        self.found.push((signature.ident.to_string(), signature.span().start().line, end.end().line));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, f: &'ast syn::ItemFn) {
        self.add(&f.sig, f.block.span());
        visit::visit_item_fn(self, f);
    }

    fn visit_impl_item_fn(&mut self, f: &'ast syn::ImplItemFn) {
        self.add(&f.sig, f.block.span());
        visit::visit_impl_item_fn(self, f);
    }

    fn visit_trait_item_fn(&mut self, f: &'ast syn::TraitItemFn) {
        if let Some(block) = &f.default {
            self.add(&f.sig, block.span());
        }
        visit::visit_trait_item_fn(self, f);
    }

    /// A macro's definition is as long as what it makes.
    fn visit_item_macro(&mut self, m: &'ast syn::ItemMacro) {
        if let Some(name) = &m.ident {
            let lines = (m.mac.path.span().start().line, m.mac.delimiter.span().close().end().line);
            self.found.push((format!("{name}!"), lines.0, lines.1));
        }
    }
}

/// Files that are longer than [`FILE_LINES_MAX`].
pub fn long_files(sources: &[SourceFile]) -> Vec<Finding> {
    let lines = |s: &SourceFile| (s.path.display().to_string(), s.text.lines().count());
    let long = sources.iter().map(lines).filter(|(_, lines)| *lines > FILE_LINES_MAX);
    long.map(|(path, lines)| (path, format!("{lines} lines"))).collect()
}

/// Files that have unsafe code, not counting tests and the bare-metal guest.
pub fn files_with_unsafe_code(sources: &[SourceFile]) -> Vec<String> {
    let ours = sources.iter().filter(|s| !s.is_test() && !s.is_guest());
    let mut files: Vec<_> = ours
        .filter(|s| WithoutTests(Unsafe::default()).run(&s.syntax).found)
        .map(|s| s.path.display().to_string())
        .collect();
    files.sort();
    files
}

#[derive(Default)]
struct Unsafe {
    found: bool,
}

impl<'ast> Visit<'ast> for Unsafe {
    fn visit_expr_unsafe(&mut self, _: &'ast syn::ExprUnsafe) {
        self.found = true;
    }

    fn visit_item_impl(&mut self, i: &'ast syn::ItemImpl) {
        self.found |= i.unsafety.is_some();
        visit::visit_item_impl(self, i);
    }

    fn visit_item_trait(&mut self, t: &'ast syn::ItemTrait) {
        self.found |= t.unsafety.is_some();
        visit::visit_item_trait(self, t);
    }

    fn visit_signature(&mut self, s: &'ast syn::Signature) {
        self.found |= s.unsafety.is_some();
        visit::visit_signature(self, s);
    }

    fn visit_item_foreign_mod(&mut self, _: &'ast syn::ItemForeignMod) {
        self.found = true;
    }

    /// `#[unsafe(no_mangle)]`.
    fn visit_attribute(&mut self, a: &'ast syn::Attribute) {
        self.found |= a.path().is_ident("unsafe");
    }

    fn visit_macro(&mut self, m: &'ast syn::Macro) {
        let is_unsafe = |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word == "unsafe");
        self.found |= flat(m.tokens.clone()).iter().any(is_unsafe);
    }
}

/// Items of these names (functions and modules) in files under `place` that are not compiled under `condition`, as it is
/// written in their `cfg`; or the name, if there is no such item.
pub fn ungated(sources: &[SourceFile], place: &str, name: &str, condition: &str) -> Vec<Finding> {
    let mut items = Named { name, condition, ..Named::default() };
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| s.path.starts_with(place)) {
        items.visit_file(&source.syntax);
        let wrong = |line| (source.at(line), format!("{name} is not under cfg({condition})"));
        found.extend(items.ungated.drain(..).map(wrong));
    }
    if !items.seen {
        found.push((place.to_owned(), format!("has no {name}")));
    }
    found
}

#[derive(Default)]
struct Named<'a> {
    name: &'a str,
    condition: &'a str,
    seen: bool,
    ungated: Vec<usize>,
}

impl Named<'_> {
    fn look_at(&mut self, name: &Ident, attributes: &[syn::Attribute]) {
        if name == self.name {
            self.seen = true;
            let gates = |a: &syn::Attribute| match &a.meta {
                syn::Meta::List(l) => l.path.is_ident("cfg") && l.tokens.to_string() == self.condition,
                _ => false,
            };
            if !attributes.iter().any(gates) {
                self.ungated.push(name.span().start().line);
            }
        }
    }
}

impl<'ast> Visit<'ast> for Named<'_> {
    fn visit_item_mod(&mut self, m: &'ast syn::ItemMod) {
        self.look_at(&m.ident, &m.attrs);
        visit::visit_item_mod(self, m);
    }

    fn visit_item_fn(&mut self, f: &'ast syn::ItemFn) {
        self.look_at(&f.sig.ident, &f.attrs);
    }

    fn visit_impl_item_fn(&mut self, f: &'ast syn::ImplItemFn) {
        self.look_at(&f.sig.ident, &f.attrs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> SourceFile {
        SourceFile { path: path.into(), text: text.into(), syntax: syn::parse_file(text).expect("Rust") }
    }

    #[test]
    fn types_are_found_in_functions_and_macros_and_not_in_tests() {
        let sources = [
            source("x/src/a.rs", "struct A; fn f() { enum B {} } macro_rules! m { () => { trait C {} } }"),
            source(
                "x/src/b.rs",
                "struct A; type B = u8; union C { a: u8 } #[cfg(test)] mod tests { struct D; }",
            ),
            source("x/src/d.rs", "struct D;"),
            source("x/tests/a.rs", "struct D;"),
        ];
        assert_eq!(types_defined_twice(&sources).into_keys().collect::<Vec<_>>(), ["A", "B", "C"]);
    }

    #[test]
    fn every_way_to_write_unsafe_code_is_found() {
        let unsafe_code = [
            "fn f() { unsafe { g() } }",
            "unsafe fn f() {}",
            "unsafe impl Send for X {}",
            "unsafe trait X {}",
            "unsafe extern \"C\" {}",
            "#[unsafe(no_mangle)] fn f() {}",
            "fn f() { vec![unsafe { g() }]; }",
        ];
        for text in unsafe_code {
            assert_eq!(files_with_unsafe_code(&[source("x/src/a.rs", text)]), ["x/src/a.rs"], "{text}");
        }
        let safe = "// unsafe\nfn f() { \"unsafe\" } #[cfg(test)] mod tests { fn f() { unsafe { g() } } }";
        assert!(files_with_unsafe_code(&[source("x/src/a.rs", safe)]).is_empty());
    }

    #[test]
    fn functions_and_macros_of_71_lines_are_long() {
        let lines = |between| format!("pub fn f() {{\n{}}}\n", "    g();\n".repeat(between));
        assert!(long_functions(&[source("x/src/a.rs", &lines(68))]).is_empty());
        assert_eq!(long_functions(&[source("x/src/a.rs", &lines(69))]).len(), 1);
        let makes = format!("macro_rules! m {{ () => {{\n{}}} }}", lines(69));
        assert_eq!(long_functions(&[source("x/tests/a.rs", &makes)]).len(), 1);
    }

    #[test]
    fn items_without_their_condition_are_found() {
        let sources = [source("x/src/a.rs", "#[cfg(feature = \"x\")] fn a() {} impl S { fn b() {} }")];
        let ungated = |name| ungated(&sources, "x/src", name, "feature = \"x\"").len();
        assert_eq!([ungated("a"), ungated("b"), ungated("c")], [0, 1, 1]);
    }
}
