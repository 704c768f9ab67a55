//! `/vsock`: the vsock device.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checks::socket_path;
use crate::error::ConfigError;
#[cfg(feature = "schema")]
use crate::limits::MAX_SOCKET_PATH_LEN;

/// A vsock device.
///
/// `seqpacket_uds_path` is an extension. Firecracker has the other fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// CID of the guest. Any number is accepted: clients send 0 too.
    pub guest_cid: u32,
    /// Unix socket to which host programs connect. Connections of the guest go to sockets whose
    /// paths start with it.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_SOCKET_PATH_LEN)))]
    pub uds_path: PathBuf,
    /// Id of the device. Deprecated, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("deprecated" = true)))]
    pub vsock_id: Option<String>,
    /// As `uds_path`, for sockets of type `SOCK_SEQPACKET`; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_SOCKET_PATH_LEN), extend("x-vesta-extension" = true)))]
    pub seqpacket_uds_path: Option<PathBuf>,
}

impl Vsock {
    /// A device with the socket `uds_path`.
    pub fn new(guest_cid: u32, uds_path: impl Into<PathBuf>) -> Vsock {
        Vsock { guest_cid, uds_path: uds_path.into(), vsock_id: None, seqpacket_uds_path: None }
    }

    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_paths(&self.uds_path, self.seqpacket_uds_path.as_deref())
    }
}

/// New sockets of the vsock device, for a restored snapshot or a fork's child.
///
/// `seqpacket_uds_path` and `guest_cid` are extensions. Firecracker has the other field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// Unix socket to which host programs connect.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_SOCKET_PATH_LEN)))]
    pub uds_path: PathBuf,
    /// As `uds_path`, for sockets of type `SOCK_SEQPACKET`; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_SOCKET_PATH_LEN), extend("x-vesta-extension" = true)))]
    pub seqpacket_uds_path: Option<PathBuf>,
    /// CID of the guest; unchanged if absent. The device notifies the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub guest_cid: Option<u32>,
}

impl VsockOverride {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_paths(&self.uds_path, self.seqpacket_uds_path.as_deref())
    }
}

impl Vsock {
    /// Returns this device with the sockets of `by`, not checked.
    #[must_use]
    pub fn overridden(&self, by: &VsockOverride) -> Vsock {
        Vsock {
            guest_cid: by.guest_cid.unwrap_or(self.guest_cid),
            uds_path: by.uds_path.clone(),
            vsock_id: self.vsock_id.clone(),
            seqpacket_uds_path: by.seqpacket_uds_path.clone(),
        }
    }
}

/// Checks the paths of both sockets.
fn check_paths(stream: &Path, seqpacket: Option<&Path>) -> Result<(), ConfigError> {
    socket_path("uds_path", stream)?;
    let Some(path) = seqpacket else { return Ok(()) };
    socket_path("seqpacket_uds_path", path)?;
    if path == stream {
        return Err(ConfigError::SameSocketPath { path: path.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MAX_SOCKET_PATH_LEN;

    fn parse(json: &str) -> Result<Vsock, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn any_cid_and_vsock_id_are_accepted() {
        for cid in [0, 1, 2, 3, u32::MAX] {
            let vsock =
                parse(&format!(r#"{{"guest_cid":{cid},"uds_path":"v.sock","vsock_id":"root"}}"#)).unwrap();
            assert_eq!((vsock.guest_cid, vsock.check()), (cid, Ok(())));
        }
        let plain = parse(r#"{"guest_cid":3,"uds_path":"v.sock","vsock_id":null}"#).unwrap();
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"guest_cid":3,"uds_path":"v.sock"}"#);
    }

    #[test]
    fn override_replaces_sockets_and_keeps_an_absent_cid() {
        let vsock = parse(r#"{"guest_cid":3,"uds_path":"a","seqpacket_uds_path":"b"}"#).unwrap();
        let by = |json: &str| vsock.overridden(&serde_json::from_str(json).unwrap());
        let expected = Vsock { guest_cid: 3, uds_path: "c".into(), vsock_id: None, seqpacket_uds_path: None };
        assert_eq!(by(r#"{"uds_path":"c"}"#), expected);
        assert_eq!(by(r#"{"uds_path":"c","guest_cid":9}"#).guest_cid, 9);
    }

    #[test]
    fn invalid_fields_are_named() {
        assert!(parse(r#"{"uds_path":"v"}"#).unwrap_err().contains("guest_cid"));
        assert!(parse(r#"{"guest_cid":3}"#).unwrap_err().contains("uds_path"));
        assert!(parse(r#"{"guest_cid":4294967296,"uds_path":"v"}"#).is_err());
        assert!(parse(r#"{"guest_cid":3,"uds_path":"v","cid":3}"#).unwrap_err().contains("`cid`"));
        let check = |json: &str| parse(json).unwrap().check().unwrap_err().to_string();
        assert!(check(r#"{"guest_cid":3,"uds_path":""}"#).contains("uds_path is 0 bytes"));
        let long = "x".repeat(MAX_SOCKET_PATH_LEN + 1);
        assert!(check(&format!(r#"{{"guest_cid":3,"uds_path":"{long}"}}"#)).contains("108 bytes"));
        let same = check(r#"{"guest_cid":3,"uds_path":"v","seqpacket_uds_path":"v"}"#);
        assert!(same.contains("seqpacket_uds_path"), "{same}");
    }
}
