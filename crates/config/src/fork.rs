//! `/fork` (an extension): children of a running microVM.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::vm_config::null_is_default;
use crate::{ConfigError, InstanceId, Logger, NetworkOverride, Serial, VsockOverride};

/// Most children of one call.
pub const MAX_CHILDREN: usize = 1000;

/// The body of `PUT /fork`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fork {
    /// The children to be, at least one.
    pub children: Vec<Child>,
    /// Where this microVM's own writes go from now on, for drives where the default is not right.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub drives: Vec<DriveOverlay>,
}

/// A child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Child {
    /// Its id.
    pub id: InstanceId,
    /// Where it serves its API; not at all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_socket: Option<PathBuf>,
    /// The cgroup that it moves to (a directory with a `cgroup.procs`); that of its parent where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
    /// Where its writes go, for drives where the default is not right.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub drives: Vec<DriveOverlay>,
    /// Its taps: it has none of its parent's. An interface that is not named here is there, with its link down.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Where its serial console goes; nowhere where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The sockets of its vsock device. Where absent it has none: host programs cannot reach it, nor it them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// What its guest reads from the metadata service; what its parent's does where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds: Option<serde_json::Value>,
    /// How it logs; as its parent where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Whether it runs at once; otherwise it is paused.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub resume: bool,
}

/// The overlay that takes a drive's writes after a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverlay {
    /// The drive.
    pub drive_id: String,
    /// The file, which must not exist yet or be empty.
    pub overlay: PathBuf,
}

/// Why children cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForkError {
    /// Not one, or more than are possible.
    #[error("children has {count} entries: it must have 1 to {MAX_CHILDREN}")]
    Count {
        /// How many were given.
        count: usize,
    },
    /// Two things that must differ.
    #[error("{field} {value} is given twice")]
    Twice {
        /// Which field.
        field: &'static str,
        /// What is in it.
        value: String,
    },
}

impl Fork {
    /// Checks that children can be told apart.
    pub fn check(&self) -> Result<(), ConfigError> {
        let count = self.children.len();
        if count == 0 || count > MAX_CHILDREN {
            return Err(ForkError::Count { count }.into());
        }
        once("id", self.children.iter().map(|child| child.id.as_str().to_owned()))?;
        let shown = |path: &PathBuf| path.display().to_string();
        once("api_socket", self.children.iter().filter_map(|child| child.api_socket.as_ref().map(shown)))?;
        let sockets = self.children.iter().filter_map(|child| child.vsock_override.as_ref());
        let paths = sockets.flat_map(|vsock| [Some(&vsock.uds_path), vsock.seqpacket_uds_path.as_ref()]);
        once("vsock_override path", paths.flatten().map(shown))?;
        let taps = self.children.iter().flat_map(|child| &child.network_overrides);
        once("host_dev_name", taps.clone().filter_map(|tap| tap.host_dev_name.clone()))?;
        once("passt socket", taps.clone().filter_map(|tap| tap.socket.as_ref().map(shown)))?;
        once("tap descriptor", taps.filter_map(|tap| tap.fds.as_ref()).flatten().map(ToString::to_string))?;
        for child in &self.children {
            once("iface_id", child.network_overrides.iter().map(|network| network.iface_id.clone()))?;
        }
        let overlays = self.children.iter().flat_map(|child| &child.drives).chain(&self.drives);
        once("overlay", overlays.map(|drive| shown(&drive.overlay)))?;
        for drives in self.children.iter().map(|child| &child.drives).chain([&self.drives]) {
            once("drive_id", drives.iter().map(|drive| drive.drive_id.clone()))?;
        }
        self.children.iter().filter_map(|child| child.serial.as_ref()).try_for_each(Serial::check)
    }
}

/// Checks that no value of a field comes twice.
pub(crate) fn once(field: &'static str, values: impl Iterator<Item = String>) -> Result<(), ForkError> {
    let mut seen = BTreeSet::new();
    for value in values {
        if seen.contains(&value) {
            return Err(ForkError::Twice { field, value });
        }
        seen.insert(value);
    }
    Ok(())
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_true(value: &bool) -> bool {
    *value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fork(json: &str) -> Result<Fork, String> {
        let fork: Fork = serde_json::from_str(json).map_err(|e| e.to_string())?;
        fork.check().map_err(|e| e.to_string())?;
        Ok(fork)
    }

    #[test]
    fn a_child_needs_an_id_and_runs_at_once() {
        let fork = fork(r#"{"children":[{"id":"a"}]}"#).unwrap();
        assert!(fork.children[0].resume && fork.children[0].api_socket.is_none());
        let nulls =
            r#"{"children":[{"id":"a","drives":null,"network_overrides":null,"mmds":null}],"drives":null}"#;
        assert_eq!(super::tests::fork(nulls).unwrap(), fork);
    }

    #[test]
    fn children_that_cannot_be_told_apart_are_refused_by_what_they_share() {
        for (json, named) in [
            (r#"{"children":[]}"#, "0 entries"),
            (r#"{"children":[{"id":"a"},{"id":"a"}]}"#, "id a "),
            (r#"{"children":[{"id":"a_b"}]}"#, "a_b"),
            (r#"{"children":[{"id":"a","api_socket":"/s"},{"id":"b","api_socket":"/s"}]}"#, "api_socket /s"),
            (
                r#"{"children":[{"id":"a","vsock_override":{"uds_path":"/v"}},{"id":"b","vsock_override":{"uds_path":"/v"}}]}"#,
                "vsock_override path /v",
            ),
            (
                r#"{"children":[{"id":"a","drives":[{"drive_id":"d","overlay":"/o"}]}],"drives":[{"drive_id":"d","overlay":"/o"}]}"#,
                "overlay /o",
            ),
            (r#"{"children":[{"id":"a","color":1}]}"#, "color"),
        ] {
            let error = fork(json).unwrap_err();
            assert!(error.contains(named), "{json}: {error}");
        }
    }
}
