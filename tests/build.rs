//! Programs for guests go into their initial RAM disks: without what only a debugger reads.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,--strip-debug");
}
