//! Writes `docs/api/openapi.yaml`, the description of the API in OpenAPI 3.1, and the same as
//! `openapi.json`, which the monitor serves: `cargo xtask openapi [--check]`.
//!
//! Everything that a client sends or gets is a struct of `config`, which has its schema from the
//! feature `schema`: fields, types and texts from the struct and its doc comments, bounds and
//! defaults from the constants that its `check` uses. [`operations`] says which endpoint has which.
//!
//! # Invariants
//!
//! - The feature `schema` reaches no monitor: this is a crate of its own, on which no other
//!   depends, so that building a monitor enables it nowhere.
//! - What a description says is for users. A link of a doc comment that only a Rust programmer
//!   could follow is an error ([`text`]).

#![forbid(unsafe_code)]

mod document;
#[cfg(test)]
mod firecracker;
mod operations;
mod schemas;
#[cfg(test)]
mod tests;
mod text;
mod yaml;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

/// The name of each file, and its text.
type Files = [(PathBuf, String); 2];

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect::<Vec<_>>().as_slice()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vesta-openapi: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    match args {
        [] => {
            for (path, text) in files()? {
                std::fs::write(&path, text).with_context(|| path.display().to_string())?;
                println!("{}", path.display());
            }
            Ok(())
        }
        [check] if check == "--check" => check_files(),
        _ => bail!("usage: cargo xtask openapi [--check]"),
    }
}

/// The files as they should be.
fn files() -> Result<Files> {
    let document = document::document()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).context("the repository")?;
    let directory = root.join("docs/api");
    let yaml = format!(
        "# Written by `cargo xtask openapi` from the structs of crates/config. Do not edit.\n{}",
        yaml::write(&document)
    );
    Ok([(directory.join("openapi.yaml"), yaml), (directory.join("openapi.json"), document.to_string())])
}

/// Checks that the files are as they should be.
fn check_files() -> Result<()> {
    for (path, text) in files()? {
        let is = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if is != text {
            bail!("{}: stale; run cargo xtask openapi", path.display());
        }
    }
    Ok(())
}
