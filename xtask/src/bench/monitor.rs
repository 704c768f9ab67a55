//! A monitor to measure.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vesta_tests::guest::env;

use crate::test::build_vmm;

/// A monitor to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Monitor {
    /// What tables call it.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) kind: MonitorKind,
    /// It is what vesta is compared with. One that cannot do what is asked is left out, with its
    /// reason.
    pub(super) peer: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum MonitorKind {
    /// This one, or an older build of it.
    Vesta,
    /// It has Firecracker's API and flags, and nothing more.
    Firecracker,
    /// QEMU with its `microvm` machine.
    Qemu,
}

impl Monitor {
    /// The monitor under test: the binary that `VESTA_VMM` names, else one that is built here.
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
