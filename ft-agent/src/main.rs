//! vmft: a virtual machine that goes on running when the host under it dies.

fn main() {}
