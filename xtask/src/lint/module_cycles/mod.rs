//! `lint::module_cycles`: the modules of a crate do not depend on each other in a circle.
//!
//! The module tree is compared level by level. At each level the nodes are the child modules of one
//! module, each with all that is below it, and that module's own items. A reference from inside
//! `a::x` to an item of `b::y` is an edge from `a` to `b`; a child that uses an item defined in its
//! parent's file is an edge from the child to the parent's items.
//!
//! References are `use` declarations and paths in code, in macro calls and in the strings of
//! attributes. A name counts where its item is defined, not where it is re-exported: `mod` and
//! `pub use` are no edges. What only test builds have is left out. Method calls and macros that
//! define items are not followed.

mod collect;
mod graph;
mod module;
mod resolve;
mod tree;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use self::graph::Cycle;
use self::tree::Tree;
use super::finding::Finding;
use super::sources::Sources;

/// Checks the crates that have one of the files; reports cycles that have a reference in one.
pub(super) fn check(sources: &Sources) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for root in crate_roots(sources)? {
        let tree = Tree::read(sources.root(), &root.file)?;
        for cycle in graph::cycles(&tree) {
            let chosen = |file: &PathBuf| sources.files().binary_search(file).is_ok();
            if cycle.edges.iter().any(|edge| chosen(&edge.file)) {
                findings.push(finding(&root.name, &cycle));
            }
        }
    }
    Ok(findings)
}

fn finding(crate_name: &str, cycle: &Cycle) -> Finding {
    let first = &cycle.edges[0];
    let mut circle: Vec<&str> = cycle.edges.iter().map(|edge| edge.from.as_str()).collect();
    circle.push(&first.from);
    let what = format!(
        "{crate_name}: module cycle {}; move what they share into a leaf module",
        circle.join(" -> ")
    );
    let mut finding = Finding::new(&first.file, first.line, what);
    finding.details = cycle
        .edges
        .iter()
        .map(|edge| {
            let place = format!("{}:{}", edge.file.display(), edge.line);
            format!("{} -> {}: {place}: {}", edge.from, edge.to, edge.path)
        })
        .collect();
    finding
}

/// The root file of a crate.
struct CrateRoot {
    name: String,
    /// Relative to the repository.
    file: PathBuf,
}

/// What `cargo metadata` prints, as far as it is read here.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
    src_path: PathBuf,
}

/// The crates of all workspaces in the repository whose package has one of the files.
fn crate_roots(sources: &Sources) -> Result<Vec<CrateRoot>> {
    let mut roots = Vec::new();
    // The workspaces, also where only some files were asked for.
    for workspace in ["Cargo.toml", "fuzz/Cargo.toml"] {
        if !sources.root().join(workspace).exists() {
            continue;
        }
        for package in metadata(&sources.root().join(workspace))?.packages {
            let directory = package.manifest_path.parent().unwrap_or(Path::new("/")).to_owned();
            let directory = directory.strip_prefix(sources.root()).context("a package's directory")?;
            if !sources.files().iter().any(|file| file.starts_with(directory)) {
                continue;
            }
            for target in package.targets {
                let file = target.src_path.strip_prefix(sources.root()).context("a crate's root")?;
                let name = match target.kind.first().map(String::as_str) {
                    Some("lib") => package.name.clone(),
                    kind => format!("{} ({} {})", package.name, kind.unwrap_or_default(), target.name),
                };
                roots.push(CrateRoot { name, file: file.to_owned() });
            }
        }
    }
    Ok(roots)
}

/// Asks cargo for the packages of a workspace; without their dependencies, so without a network.
fn metadata(manifest: &Path) -> Result<Metadata> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(manifest);
    let output = cargo.output().context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    serde_json::from_slice(&output.stdout).context("cannot read what cargo metadata printed")
}

#[cfg(test)]
mod tests;
