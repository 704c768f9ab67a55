//! `/fork`: children of a running microVM. An extension.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks;
use crate::drive::DriveOverlay;
use crate::error::{ConfigError, ForkError};
use crate::id::InstanceId;
use crate::limits::MAX_CHILDREN;
use crate::logger::Logger;
use crate::metrics::Metrics;
use crate::network_override::NetworkOverride;
use crate::serde_helpers::null_is_default;
use crate::serial::Serial;
use crate::vsock::VsockOverride;

/// The body of `PUT /fork`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Fork {
    /// The children to start, 1 to [`MAX_CHILDREN`].
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_CHILDREN)))]
    pub children: Vec<Child>,
    /// New overlays of this microVM's own drives. Writable drives that are not listed get a default
    /// path.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::null_is_default::<Vec<DriveOverlay>>")
    )]
    pub drives: Vec<DriveOverlay>,
}

/// A child of a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Child {
    /// Id of the child.
    pub id: InstanceId,
    /// API socket of the child; it has no API if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_socket: Option<PathBuf>,
    /// Cgroup of the child: a directory with a `cgroup.procs`. The parent's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
    /// New overlays of the child's drives. Writable drives that are not listed get a
    /// default path.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::null_is_default::<Vec<DriveOverlay>>")
    )]
    pub drives: Vec<DriveOverlay>,
    /// Taps of the child, which keeps none of its parent's. The link of an interface that is not
    /// listed is down.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::null_is_default::<Vec<NetworkOverride>>")
    )]
    pub network_overrides: Vec<NetworkOverride>,
    /// Serial console of the child; its output is discarded if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// Sockets of the child's vsock device. If absent, host and guest cannot connect to each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Contents of the child's metadata service; the parent's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<serde_json::Map<String, serde_json::Value>>"))]
    pub mmds: Option<serde_json::Value>,
    /// Logger of the child; as the parent's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Output of the child's metrics; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Whether the child runs after its start; otherwise it is paused.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    #[cfg_attr(feature = "schema", schemars(extend("default" = yes())))]
    pub resume: bool,
}

impl Child {
    /// A running child without API, network and vsock sockets, and with default overlays.
    pub fn new(id: InstanceId) -> Child {
        Child {
            id,
            api_socket: None,
            cgroup: None,
            drives: Vec::new(),
            network_overrides: Vec::new(),
            serial: None,
            vsock_override: None,
            mmds: None,
            logger: None,
            metrics: None,
            resume: true,
        }
    }
}

impl Fork {
    /// Checks the number of children, and that ids, paths and taps are unique.
    pub fn check(&self) -> Result<(), ConfigError> {
        let count = self.children.len();
        if count == 0 || count > MAX_CHILDREN {
            return Err(ForkError::Count { count }.into());
        }
        checks::unique("id", self.children.iter().map(|child| child.id.as_str().to_owned()))?;
        let shown = |path: &PathBuf| path.display().to_string();
        checks::unique(
            "api_socket",
            self.children.iter().filter_map(|child| child.api_socket.as_ref().map(shown)),
        )?;
        let sockets = self.children.iter().filter_map(|child| child.vsock_override.as_ref());
        let paths = sockets.flat_map(|vsock| [Some(&vsock.uds_path), vsock.seqpacket_uds_path.as_ref()]);
        checks::unique("vsock_override path", paths.flatten().map(shown))?;
        let taps = self.children.iter().flat_map(|child| &child.network_overrides);
        checks::unique("host_dev_name", taps.clone().filter_map(|tap| tap.host_dev_name.clone()))?;
        checks::unique("passt socket", taps.clone().filter_map(|tap| tap.socket.as_ref().map(shown)))?;
        checks::unique(
            "tap descriptor",
            taps.filter_map(|tap| tap.fds.as_ref()).flatten().map(ToString::to_string),
        )?;
        for child in &self.children {
            checks::unique(
                "iface_id",
                child.network_overrides.iter().map(|network| network.iface_id.clone()),
            )?;
        }
        let overlays = self.children.iter().flat_map(|child| &child.drives).chain(&self.drives);
        checks::unique("overlay", overlays.map(|drive| shown(&drive.overlay)))?;
        for drives in self.children.iter().map(|child| &child.drives).chain([&self.drives]) {
            checks::unique("drive_id", drives.iter().map(|drive| drive.drive_id.clone()))?;
        }
        let metrics = || self.children.iter().filter_map(|child| child.metrics.as_ref());
        checks::unique("metrics_path", metrics().map(|metrics| shown(&metrics.metrics_path)))?;
        metrics().try_for_each(Metrics::check)?;
        let mut sockets = self.children.iter().filter_map(|child| child.vsock_override.as_ref());
        sockets.try_for_each(VsockOverride::check)?;
        self.children.iter().filter_map(|child| child.serial.as_ref()).try_for_each(Serial::check)
    }
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
    fn child_needs_an_id_only_and_is_resumed_by_default() {
        let fork = fork(r#"{"children":[{"id":"a"}]}"#).unwrap();
        assert!(fork.children[0].resume && fork.children[0].api_socket.is_none());
        let nulls =
            r#"{"children":[{"id":"a","drives":null,"network_overrides":null,"mmds":null}],"drives":null}"#;
        assert_eq!(super::tests::fork(nulls).unwrap(), fork);
    }

    #[test]
    fn duplicate_ids_paths_and_drives_are_named() {
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
            (
                r#"{"children":[{"id":"a","metrics":{"metrics_path":"m"}},{"id":"b","metrics":{"metrics_path":"m"}}]}"#,
                "metrics_path m",
            ),
            (r#"{"children":[{"id":"a","metrics":{"metrics_path":""}}]}"#, "metrics_path is empty"),
            (r#"{"children":[{"id":"a","color":1}]}"#, "color"),
        ] {
            let error = fork(json).unwrap_err();
            assert!(error.contains(named), "{json}: {error}");
        }
    }
}
