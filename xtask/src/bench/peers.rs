//! The monitors that vesta is compared with: Firecracker where it has been fetched, and those that
//! the command line names.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result};
use lexopt::prelude::*;

use super::monitor::{Monitor, MonitorKind};
use crate::peers;
use crate::process::say;

/// The `--peer` name of the binary that `cargo xtask peers` fetches.
const FIRECRACKER: &str = "firecracker";

/// The peers that the command line asks for.
#[derive(Debug, Default)]
pub(super) struct Peers {
    named: Vec<OsString>,
    none: bool,
}

/// Reads the options `--runs N`, `runs` by default, and those of peers.
pub(super) fn peers_and_runs(parser: &mut lexopt::Parser, mut runs: usize) -> Result<(Peers, usize)> {
    let mut peers = Peers::default();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("peer") => peers.add(parser.value()?),
            Long("no-peers") => peers.only_named(),
            Long("runs") => runs = parser.value()?.parse()?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    Ok((peers, runs))
}

impl Peers {
    /// Adds `--peer firecracker` or `--peer NAME=PATH`.
    pub(super) fn add(&mut self, value: OsString) {
        self.named.push(value);
    }

    /// `--no-peers`: measures only monitors that are named.
    pub(super) fn only_named(&mut self) {
        self.none = true;
    }

    /// The monitor under test and the peers.
    pub(super) fn with_vesta(self) -> Result<Vec<Monitor>> {
        let mut monitors = vec![Monitor::vesta()?];
        monitors.extend(self.monitors()?);
        Ok(monitors)
    }

    /// Finds the monitors, and asks each for its version.
    fn monitors(self) -> Result<Vec<Monitor>> {
        let mut monitors = Vec::new();
        let is_named = self.named.iter().any(|name| name == FIRECRACKER);
        if is_named {
            monitors.push(monitor(None, peers::fetch()?)?);
        } else if !self.none {
            match peers::cached()? {
                Some(path) => monitors.push(monitor(None, path)?),
                None => say!("Firecracker is not measured; `cargo xtask peers` fetches it"),
            }
        }
        for text in self.named.into_iter().filter(|name| name != FIRECRACKER) {
            let text = text.to_str().with_context(|| format!("--peer {}: not UTF-8", text.display()))?;
            let (name, path) = text
                .split_once('=')
                .with_context(|| format!("--peer {text}: unknown; {FIRECRACKER} or NAME=PATH"))?;
            let path = std::fs::canonicalize(path).with_context(|| format!("--peer {name}: {path}"))?;
            monitors.push(monitor(Some(name), path)?);
        }
        for monitor in &monitors {
            say!("measuring {} ({})", monitor.name, monitor.path.display());
        }
        Ok(monitors)
    }
}

/// The monitor at this path; its `--version` tells its kind.
fn monitor(name: Option<&str>, path: PathBuf) -> Result<Monitor> {
    let version = peers::version(&path)?;
    let kind = kind(&version);
    Ok(Monitor { name: shown(name, &version, kind), path, kind, peer: true })
}

fn kind(version: &str) -> MonitorKind {
    if version.starts_with("vesta") { MonitorKind::Vesta } else { MonitorKind::Firecracker }
}

/// Its name in tables. For other monitors than vesta it includes the version.
fn shown(name: Option<&str>, version: &str, kind: MonitorKind) -> String {
    match name {
        None => version.to_owned(),
        Some(name) if kind == MonitorKind::Vesta => name.to_owned(),
        Some(name) => format!("{name} ({version})"),
    }
}

/// The lines below a table about peers that lack a feature.
pub(super) fn lacking(monitors: &[Monitor], what: &str) -> String {
    let without = |monitor: &&Monitor| !monitor.is_vesta();
    monitors
        .iter()
        .filter(without)
        .map(|monitor| not_measured(&monitor.name, &format!("it has no {what}")))
        .collect()
}

/// A line below a table. Only the first line of an error is shown.
pub(super) fn not_measured(name: &str, why: &str) -> String {
    let why = why.lines().next().unwrap_or_default();
    format!("\nNot measured: {name}: {why}.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_monitor_is_shown_with_its_version() {
        let shown = |name, version| super::shown(name, version, kind(version));
        assert_eq!(shown(None, "Firecracker v1.12.1"), "Firecracker v1.12.1");
        assert_eq!(shown(Some("fc"), "Firecracker v1.13.0"), "fc (Firecracker v1.13.0)");
        assert_eq!(shown(Some("old"), "vesta-vmm v0.1.0"), "old");
    }

    #[test]
    fn an_invalid_peer_argument_is_refused() {
        let mut peers = Peers::default();
        peers.only_named();
        peers.add("old".into());
        let error = peers.monitors().unwrap_err().to_string();
        assert_eq!(error, "--peer old: unknown; firecracker or NAME=PATH");
    }
}
