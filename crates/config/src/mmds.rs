//! `/mmds/config`: the metadata service (MMDS).

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{ConfigError, MmdsConfigError};
use crate::network::{NetBackendKind, NetworkInterface};
use crate::serde_helpers::null_is_default;

/// Default IPv4 address of the service, the one of EC2.
pub const DEFAULT_MMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// The addresses that [`MmdsConfig::check`] accepts, as a pattern.
#[cfg(feature = "schema")]
const LINK_LOCAL: &str = r"^169\.254\.([1-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-4])\.([0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])$";

/// Version of the service: whether requests need a session token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum MmdsVersion {
    /// Requests need no token.
    #[default]
    V1,
    /// Requests need a session token of this microVM.
    V2,
}

/// Configuration of the metadata service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(transform = crate::schema::require_network_interfaces))]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether requests need a session token.
    #[serde(default, deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<MmdsVersion>"))]
    pub version: MmdsVersion,
    /// Ids of the network interfaces through which the guest reaches the service.
    #[serde(default, deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1)))]
    pub network_interfaces: Vec<String>,
    /// IPv4 address of the service; [`DEFAULT_MMDS_ADDRESS`] if absent.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = LINK_LOCAL), extend("default" = DEFAULT_MMDS_ADDRESS)))]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether responses are always in EC2's text format, even if the guest accepts JSON.
    #[serde(default)]
    pub imds_compat: bool,
}

impl MmdsConfig {
    /// IPv4 address of the service.
    pub fn address(&self) -> Ipv4Addr {
        self.ipv4_address.unwrap_or(DEFAULT_MMDS_ADDRESS)
    }

    /// Deserializes the section of a configuration file. A section without interfaces, which
    /// flintlock writes for guests without a network, counts as absent.
    pub(crate) fn deserialize_in_file<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<MmdsConfig>, D::Error> {
        let config = Option::<MmdsConfig>::deserialize(from)?;
        config.as_ref().map_or(Ok(()), MmdsConfig::check_address).map_err(serde::de::Error::custom)?;
        Ok(config.filter(|config| !config.network_interfaces.is_empty()))
    }

    /// Checks bounds. [`MmdsConfig::check_interfaces`] checks the interfaces.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.network_interfaces.is_empty() {
            return Err(MmdsConfigError::NoInterfaces.into());
        }
        self.check_address()
    }

    fn check_address(&self) -> Result<(), ConfigError> {
        // RFC 3927, 2.1: the first and the last 256 link-local addresses are reserved.
        let [169, 254, 1..=254, _] = self.address().octets() else {
            return Err(MmdsConfigError::NotLinkLocal(self.address()).into());
        };
        Ok(())
    }

    /// Checks that `interfaces` has each interface of the service, with a backend whose frames the
    /// monitor sees and one queue pair.
    pub fn check_interfaces(&self, interfaces: &[NetworkInterface]) -> Result<(), ConfigError> {
        for id in &self.network_interfaces {
            let Some(interface) = interfaces.iter().find(|interface| interface.iface_id == *id) else {
                return Err(MmdsConfigError::NoSuchInterface(id.clone()).into());
            };
            if interface.backend == NetBackendKind::Vhost {
                return Err(MmdsConfigError::Vhost(id.clone()).into());
            }
            if let Some(pairs @ 2..) = interface.num_queues {
                return Err(MmdsConfigError::SeveralQueues { iface_id: id.clone(), pairs }.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> MmdsConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn interfaces_suffice() {
        let config = parse(r#"{"network_interfaces":["eth0"],"version":null,"ipv4_address":null}"#);
        assert_eq!((config.version, config.imds_compat), (MmdsVersion::V1, false));
        assert_eq!(config.address(), DEFAULT_MMDS_ADDRESS);
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn configuration_without_interfaces_is_refused() {
        for json in ["{}", r#"{"version":"V2","network_interfaces":[]}"#] {
            let error = parse(json).check().unwrap_err().to_string();
            assert!(error.contains("network_interfaces is empty"), "{error}");
        }
    }

    #[test]
    fn section_without_interfaces_in_a_file_counts_as_absent() {
        let in_file = |json: &str| {
            MmdsConfig::deserialize_in_file(&mut serde_json::Deserializer::from_str(json))
                .map_err(|e| e.to_string())
        };
        for json in [r#"{"version":"V1"}"#, r#"{"network_interfaces":[]}"#, "null"] {
            assert_eq!(in_file(json), Ok(None), "{json}");
        }
        let config = in_file(r#"{"network_interfaces":["a"]}"#).unwrap().unwrap();
        assert_eq!(config.network_interfaces, ["a"]);
        // The other fields are checked all the same.
        for (json, named) in [
            (r#"{"version":"V3"}"#, "V3"),
            (r#"{"color":1}"#, "color"),
            (r#"{"ipv4_address":"10.0.0.1"}"#, "10.0.0.1"),
        ] {
            assert!(in_file(json).unwrap_err().contains(named), "{json}");
        }
    }

    #[test]
    fn only_unreserved_link_local_addresses_are_accepted() {
        for (address, valid) in [
            ("169.254.1.0", true),
            ("169.254.254.255", true),
            ("169.254.0.255", false),
            ("169.254.255.0", false),
            ("169.253.1.1", false),
            ("10.0.0.1", false),
        ] {
            let config = parse(&format!(r#"{{"network_interfaces":["a"],"ipv4_address":"{address}"}}"#));
            assert_eq!(config.check().is_ok(), valid, "{address}");
        }
    }

    #[test]
    fn interface_that_cannot_serve_mmds_is_named() {
        let config = parse(r#"{"network_interfaces":["a","b"]}"#);
        let interface = |id: &str, more: &str| -> NetworkInterface {
            serde_json::from_str(&format!(r#"{{"iface_id":"{id}","host_dev_name":"tap"{more}}}"#)).unwrap()
        };
        let check = |other| config.check_interfaces(&[other, interface("a", "")]).map_err(|e| e.to_string());
        assert_eq!(check(interface("b", r#","num_queues":1"#)), Ok(()));
        for (other, named) in [
            (interface("c", ""), "names b"),
            (interface("b", r#","backend":"vhost""#), "vhost"),
            (interface("b", r#","num_queues":2"#), "num_queues 2"),
        ] {
            let error = check(other).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn unknown_version_is_refused() {
        let error = serde_json::from_str::<MmdsConfig>(r#"{"version":"V3","network_interfaces":["a"]}"#);
        assert!(error.unwrap_err().to_string().contains("V3"));
    }
}
