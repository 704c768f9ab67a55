//! `/vsock`: the socket device.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ConfigError;

/// Longest path of a Unix socket in bytes.
pub const MAX_SOCKET_PATH_LEN: usize = 107;

/// A socket device.
///
/// `seqpacket_uds_path` is an extension; Firecracker has the other fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id. Any number: clients send 0, too.
    pub guest_cid: u32,
    /// The Unix socket that host clients connect to; connections of the guest go to sockets named after it.
    pub uds_path: PathBuf,
    /// A name. Deprecated, and of no use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// As `uds_path`, for host clients that send messages (`SOCK_SEQPACKET`). There is no such socket where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seqpacket_uds_path: Option<PathBuf>,
}

impl Vsock {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_path("uds_path", &self.uds_path)?;
        let Some(path) = &self.seqpacket_uds_path else { return Ok(()) };
        check_path("seqpacket_uds_path", path)?;
        if *path == self.uds_path {
            return Err(ConfigError::SameSocketPath { path: path.clone() });
        }
        Ok(())
    }
}

/// What another microVM made of the same guest has for its socket device: at a fork (and, under this name, where a snapshot is loaded).
///
/// `seqpacket_uds_path` and `guest_cid` are extensions; Firecracker has the other field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// Instead of [`Vsock::uds_path`].
    pub uds_path: PathBuf,
    /// Instead of [`Vsock::seqpacket_uds_path`], and none where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seqpacket_uds_path: Option<PathBuf>,
    /// Instead of [`Vsock::guest_cid`], which stays where absent. The guest hears of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_cid: Option<u32>,
}

impl Vsock {
    /// This device with other sockets; not checked.
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

fn check_path(field: &'static str, path: &Path) -> Result<(), ConfigError> {
    let len = path.as_os_str().as_bytes().len();
    if (1..=MAX_SOCKET_PATH_LEN).contains(&len) {
        Ok(())
    } else {
        Err(ConfigError::SocketPathLength { field, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Vsock, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn any_cid_will_do_and_vsock_id_may_be_there() {
        for cid in [0, 1, 2, 3, u32::MAX] {
            let vsock =
                parse(&format!(r#"{{"guest_cid":{cid},"uds_path":"v.sock","vsock_id":"root"}}"#)).unwrap();
            assert_eq!((vsock.guest_cid, vsock.check()), (cid, Ok(())));
        }
        let plain = parse(r#"{"guest_cid":3,"uds_path":"v.sock","vsock_id":null}"#).unwrap();
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"guest_cid":3,"uds_path":"v.sock"}"#);
    }

    #[test]
    fn an_override_replaces_the_sockets_and_keeps_the_cid_unless_it_has_one() {
        let vsock = parse(r#"{"guest_cid":3,"uds_path":"a","seqpacket_uds_path":"b"}"#).unwrap();
        let by = |json: &str| vsock.overridden(&serde_json::from_str(json).unwrap());
        let expected = Vsock { guest_cid: 3, uds_path: "c".into(), vsock_id: None, seqpacket_uds_path: None };
        assert_eq!(by(r#"{"uds_path":"c"}"#), expected);
        assert_eq!(by(r#"{"uds_path":"c","guest_cid":9}"#).guest_cid, 9);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
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
