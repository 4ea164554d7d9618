//! Input and output in crates that must have none: `clippy.toml` bans the usual calls, and this every name.

use crate::Finding;
use crate::arrows::Paths;
use crate::sources::{SourceFile, WithoutTests};

/// Macros that print.
const PRINT: &[&str] = &["print", "println", "eprint", "eprintln", "dbg"];

/// Names of the standard library, with all that is in them, that lead out of the program.
const OUTSIDE: &[&str] = &[
    "std::env",
    "std::fs",
    "std::io::stderr",
    "std::io::stdin",
    "std::io::stdout",
    "std::net",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
];

/// Uses of input and output in the sources of the crates in these folders.
pub fn input_and_output(sources: &[SourceFile], crates: &[&str]) -> Vec<Finding> {
    let mut found = Vec::new();
    let is_pure = |s: &&SourceFile| crates.iter().any(|c| s.path.starts_with(format!("{c}/src")));
    for source in sources.iter().filter(is_pure).filter(|s| !s.is_test()) {
        let paths = WithoutTests(Paths::default()).run(&source.syntax);
        for (path, line) in paths.found {
            let name = path.join("::");
            let leads_out =
                |o: &&str| name.strip_prefix(*o).is_some_and(|r| r.is_empty() || r.starts_with("::"));
            if OUTSIDE.iter().any(leads_out) {
                found.push((source.at(line), name));
            }
        }
        for (name, line) in paths.macros {
            if PRINT.contains(&name.as_str()) {
                found.push((source.at(line), format!("{name}!")));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> usize {
        let source =
            SourceFile { path: path.into(), text: text.into(), syntax: syn::parse_file(text).expect("Rust") };
        input_and_output(&[source], &["x"]).len()
    }

    #[test]
    fn every_way_out_of_a_pure_crate_is_found() {
        let ways = [
            "use std::fs;",
            "use std::{io, net::TcpStream};",
            "fn f() { std::fs::read(\"x\"); }",
            "fn f() { println!(); }",
            "fn f() { assert!({ std::eprintln!(\"x\"); true }); }",
            "macro_rules! m { () => { std::env::var(\"x\") } }",
            "mod a { use std::time::Instant; }",
        ];
        for text in ways {
            assert_eq!(found("x/src/a.rs", text), 1, "{text}");
        }
        let pure = "use std::io::Read; use std::time::Duration; #[cfg(test)] mod tests { use std::fs; }";
        assert_eq!(
            [found("x/src/a.rs", pure), found("x/tests/a.rs", ways[0]), found("y/src/a.rs", ways[0])],
            [0; 3]
        );
    }
}
