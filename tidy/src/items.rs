//! Types, functions, unsafe code.

use std::collections::BTreeMap;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::sources::{SourceFile, WithoutTests};

/// Lines of a function, from its signature to its closing brace, beyond which it is long.
pub const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file beyond which it is long.
pub const FILE_LINES_MAX: usize = 500;

/// A finding: where, and what.
pub type Finding = (String, String);

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
}

/// Files that are longer than [`FILE_LINES_MAX`].
pub fn long_files(sources: &[SourceFile]) -> Vec<Finding> {
    let lines = |s: &SourceFile| (s.path.display().to_string(), s.text.lines().count());
    let long = sources.iter().map(lines).filter(|(_, lines)| *lines > FILE_LINES_MAX);
    long.map(|(path, lines)| (path, format!("{lines} lines"))).collect()
}

/// Files that have unsafe code, without tests and the bare-metal guest.
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

    fn visit_signature(&mut self, s: &'ast syn::Signature) {
        self.found |= s.unsafety.is_some();
        visit::visit_signature(self, s);
    }

    fn visit_item_foreign_mod(&mut self, _: &'ast syn::ItemForeignMod) {
        self.found = true;
    }
}
