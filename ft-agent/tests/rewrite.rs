//! The project's own Linux kernel, rewritten for engines that cannot trap what tells the time or chance.

mod support;

use std::collections::BTreeMap;
use std::process::Command;

use vmm::boot::rewrite::rewrite;

/// How often a disassembler that is not ours finds each instruction.
fn objdump(kernel: &std::path::Path) -> BTreeMap<String, usize> {
    let output = Command::new("objdump").args(["-d", "--no-show-raw-insn"]).arg(kernel).output().unwrap();
    let mut found = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let mnemonic = line.split('\t').nth(1).and_then(|i| i.split_whitespace().next()).unwrap_or_default();
        if ["rdtsc", "rdtscp", "rdrand", "rdseed", "rdpmc"].contains(&mnemonic) {
            *found.entry(mnemonic.to_owned()).or_default() += 1;
        }
    }
    found
}

#[test]
fn every_site_of_the_kernel_is_rewritten() {
    const TEST: &str = "every_site_of_the_kernel_is_rewritten";
    if !support::has_guest(TEST, "linux") {
        return;
    }
    let kernel = support::image("linux", "kernel");
    let (file, rewritten) = rewrite(&std::fs::read(&kernel).unwrap()).expect("a vmlinux");
    assert!(rewritten.left.is_empty(), "{rewritten}");
    assert!(rewritten.instructions["rdtsc"] > 40, "{rewritten}");
    // Alternatives are copied to where they belong: addresses come on top.
    assert!(rewritten.sites.iter().count() > rewritten.instructions.values().sum::<usize>());
    assert!(rewrite(&file).unwrap().1.instructions.is_empty());
    if support::has("objdump") {
        let ours = rewritten.instructions.iter().map(|(name, n)| ((*name).to_owned(), *n));
        assert_eq!(ours.collect::<BTreeMap<_, _>>(), objdump(&kernel));
    }
}
