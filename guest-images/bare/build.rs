//! Links the guest as a static, non-PIE ELF with its own layout and without libc.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
    println!("cargo:rerun-if-changed={script}");
    let script = format!("-T{script}");
    for arg in ["-static", "-no-pie", "-nostartfiles", "-nostdlib", "-Wl,--build-id=none", script.as_str()] {
        println!("cargo:rustc-link-arg-bin=bare-elf={arg}");
    }
}
