//! The programs that run in guests travel in their initial RAM disks: without symbols they are a tenth as large.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-s");
}
