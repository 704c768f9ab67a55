//! Strips the programs that are put into guests' initramfs images: without symbols they are a tenth
//! as large.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-s");
}
