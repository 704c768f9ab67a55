//! Network overrides: other taps for a restored snapshot or a fork's child.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, NetworkError};
use crate::mac::MacAddress;
use crate::network::{NetworkInterface, check_distinct};

/// New host endpoint of one network interface.
///
/// `fds`, `socket` and `guest_mac` are extensions. Firecracker has the other fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Id of the interface.
    pub iface_id: String,
    /// Its tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// Descriptors of its tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub fds: Option<Vec<i32>>,
    /// Socket of its `passt`, for an interface with that backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub socket: Option<PathBuf>,
    /// New MAC address of the guest; unchanged if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub guest_mac: Option<MacAddress>,
}

/// Applies `overrides` to `networks` and checks the result. Interfaces without an override may have
/// no host endpoint.
pub fn apply_network_overrides(
    networks: &mut [NetworkInterface],
    overrides: &[NetworkOverride],
) -> Result<(), ConfigError> {
    for NetworkOverride { iface_id, host_dev_name, fds, socket, guest_mac } in overrides {
        let network = networks.iter_mut().find(|network| network.iface_id == *iface_id);
        let network = network.ok_or_else(|| NetworkError::Unknown { iface_id: iface_id.clone() })?;
        (network.host_dev_name, network.fds, network.socket) =
            (host_dev_name.clone(), fds.clone(), socket.clone());
        network.guest_mac = guest_mac.or(network.guest_mac);
        network.check()?;
    }
    for network in networks.iter().filter(|network| network.has_host_endpoint()) {
        network.check()?;
    }
    check_distinct(networks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NetworkInterfaceUpdate, RateLimiter};

    #[test]
    fn overrides_replace_endpoint_and_mac_and_keep_the_rest() {
        let parse = |json: &str| serde_json::from_str::<NetworkInterface>(json).unwrap();
        let before = [
            parse(r#"{"iface_id":"a","host_dev_name":"t0","guest_mac":"06:00:ac:10:00:02","mtu":1400}"#),
            parse(r#"{"iface_id":"b","host_dev_name":"t1","guest_mac":"06:00:ac:10:00:03"}"#),
        ];
        let over = |json: &str| {
            let mut networks = before.clone();
            networks[1].clear_host_endpoint();
            let overrides: Vec<NetworkOverride> = serde_json::from_str(json).unwrap();
            apply_network_overrides(&mut networks, &overrides).map_err(|e| e.to_string()).map(|()| networks)
        };
        let [a, b] = over(r#"[{"iface_id":"a","fds":[7],"guest_mac":"06:00:ac:10:00:09"}]"#).unwrap();
        assert_eq!((a.host_dev_name, a.fds, a.mtu), (None, Some(vec![7]), Some(1400)));
        assert_eq!(a.guest_mac.unwrap().to_string(), "06:00:ac:10:00:09");
        assert!(!b.has_host_endpoint() && b.guest_mac == before[1].guest_mac);
        let update = NetworkInterfaceUpdate {
            iface_id: "b".into(),
            rx_rate_limiter: Some(RateLimiter::default()),
            tx_rate_limiter: None,
        };
        b.updated(&update).unwrap();
        for (json, named) in [
            (r#"[{"iface_id":"c","host_dev_name":"t2"}]"#, "interface c"),
            (r#"[{"iface_id":"b"}]"#, "host_dev_name"),
            (r#"[{"iface_id":"b","socket":"/s"}]"#, "socket"),
            (r#"[{"iface_id":"b","host_dev_name":"t0"}]"#, "host_dev_name: t0"),
            (r#"[{"iface_id":"b","host_dev_name":"t2","guest_mac":"06:00:ac:10:00:02"}]"#, "guest_mac"),
        ] {
            let error = over(json).unwrap_err();
            assert!(error.contains(named), "{json}: {error}");
        }
    }
}
