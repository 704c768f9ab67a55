//! Tells the linker the order of functions in release builds.
//!
//! The kernel maps 64 KiB of a program around each page fault, so functions that run but lie apart
//! make nearly all of the program resident. `link-order.txt` names those that a monitor's life
//! runs, in the order of their first use (`cargo xtask link-order`), and the linker places them
//! next to each other. It skips names that no longer exist.
//!
//! `--symbol-ordering-file` is an option of LLD, which rustc uses for this target by default.
//! Another linker ends with an error that names the option.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name| std::env::var(name).expect("cargo sets it");
    let order = Path::new(&variable("CARGO_MANIFEST_DIR")).join("link-order.txt");
    println!("cargo::rerun-if-changed={}", order.display());
    if variable("PROFILE") == "release" && variable("TARGET") == "x86_64-unknown-linux-gnu" {
        println!("cargo::rustc-link-arg-bins=-Wl,--symbol-ordering-file={}", order.display());
        println!("cargo::rustc-link-arg-bins=-Wl,--no-warn-symbol-ordering");
    }
}
