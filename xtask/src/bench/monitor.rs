//! A monitor to measure.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vesta_tests::guest::env;

use crate::test::build_vmm;

/// A monitor to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Monitor {
    /// Its name in tables.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) kind: MonitorKind,
    /// Whether vesta is compared with it. A peer that fails is left out, with the reason.
    pub(super) peer: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum MonitorKind {
    /// vesta, perhaps an older build.
    Vesta,
    /// A monitor with Firecracker's API and flags only.
    Firecracker,
    /// QEMU with its `microvm` machine.
    Qemu,
}

impl Monitor {
    /// The monitor under test: the binary that `VESTA_VMM` names, else a new build.
    pub(super) fn vesta() -> Result<Monitor> {
        let path = match std::env::var_os(env::VMM).map(PathBuf::from) {
            Some(path) => path.canonicalize().with_context(|| format!("{}: {}", env::VMM, path.display()))?,
            None => build_vmm(true)?,
        };
        Ok(Monitor { name: "vesta".to_owned(), path, kind: MonitorKind::Vesta, peer: false })
    }

    pub(super) fn is_vesta(&self) -> bool {
        self.kind == MonitorKind::Vesta
    }
}
