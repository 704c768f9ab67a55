//! `/mmds/config`: the metadata service that the guest asks, through which network interfaces, and how strictly.

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{ConfigError, NetBackendKind, NetworkInterface};

/// Where guests look for a metadata service.
pub const DEFAULT_MMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// How strictly the guest must ask.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Whoever asks is answered.
    #[default]
    V1,
    /// Only who shows a token of this microVM's is answered.
    V2,
}

/// The metadata service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// How strictly the guest must ask.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The ids of the network interfaces through which it is reached.
    #[serde(default)]
    pub network_interfaces: Vec<String>,
    /// Its address in the guest's network; 169.254.169.254 where absent.
    #[serde(default)]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether it answers in EC2's text form always, also to who asks for JSON.
    #[serde(default)]
    pub imds_compat: bool,
}

/// What is wrong with [`MmdsConfig`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MmdsConfigError {
    /// Nothing could reach it.
    #[error("network_interfaces is empty: name at least one through which the guest reaches MMDS")]
    NoInterfaces,
    /// An interface that is not there.
    #[error("network_interfaces names {0}, and there is no such network interface")]
    NoSuchInterface(String),
    /// An interface whose frames the kernel moves.
    #[error("network interface {0} cannot reach MMDS: with the back end vhost the monitor sees no frames")]
    Vhost(String),
    /// An interface whose frames several queues move.
    #[error("network interface {iface_id} cannot reach MMDS with num_queues {pairs}: it must be 1")]
    SeveralQueues {
        /// Which interface.
        iface_id: String,
        /// How many pairs it has.
        pairs: u16,
    },
    /// An address that routers may know.
    #[error("ipv4_address is {0}: it must be link-local, between 169.254.1.0 and 169.254.254.255")]
    NotLinkLocal(Ipv4Addr),
}

impl MmdsConfig {
    /// Its address in the guest's network.
    pub fn address(&self) -> Ipv4Addr {
        self.ipv4_address.unwrap_or(DEFAULT_MMDS_ADDRESS)
    }

    /// Reads it from a configuration file. There it may name no interface, as it does for flintlock's guests without a network: then there is
    /// none, as if it was not there.
    pub(crate) fn in_file<'de, D: Deserializer<'de>>(from: D) -> Result<Option<MmdsConfig>, D::Error> {
        let config = Option::<MmdsConfig>::deserialize(from)?;
        config.as_ref().map_or(Ok(()), MmdsConfig::check_address).map_err(serde::de::Error::custom)?;
        Ok(config.filter(|config| !config.network_interfaces.is_empty()))
    }

    /// Checks bounds.
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

    /// Checks that its interfaces are among those that there are, and that it can be reached through them.
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
    fn interfaces_are_all_it_takes() {
        let config = parse(r#"{"network_interfaces":["eth0"],"ipv4_address":null}"#);
        assert_eq!((config.version, config.imds_compat), (MmdsVersion::V1, false));
        assert_eq!(config.address(), DEFAULT_MMDS_ADDRESS);
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn without_interfaces_it_reaches_nothing() {
        for json in ["{}", r#"{"version":"V2","network_interfaces":[]}"#] {
            let error = parse(json).check().unwrap_err().to_string();
            assert!(error.contains("network_interfaces is empty"), "{error}");
        }
    }

    #[test]
    fn in_a_file_without_interfaces_it_is_not_there() {
        let in_file = |json: &str| {
            MmdsConfig::in_file(&mut serde_json::Deserializer::from_str(json)).map_err(|e| e.to_string())
        };
        for json in [r#"{"version":"V1"}"#, r#"{"network_interfaces":[]}"#, "null"] {
            assert_eq!(in_file(json), Ok(None), "{json}");
        }
        let there = in_file(r#"{"network_interfaces":["a"]}"#).unwrap().unwrap();
        assert_eq!(there.network_interfaces, ["a"]);
        // What else it says is looked at all the same.
        for (json, named) in [
            (r#"{"version":"V3"}"#, "V3"),
            (r#"{"color":1}"#, "color"),
            (r#"{"ipv4_address":"10.0.0.1"}"#, "10.0.0.1"),
        ] {
            assert!(in_file(json).unwrap_err().contains(named), "{json}");
        }
    }

    #[test]
    fn only_usable_link_local_addresses_are_taken() {
        for (address, fine) in [
            ("169.254.1.0", true),
            ("169.254.254.255", true),
            ("169.254.0.255", false),
            ("169.254.255.0", false),
            ("169.253.1.1", false),
            ("10.0.0.1", false),
        ] {
            let config = parse(&format!(r#"{{"network_interfaces":["a"],"ipv4_address":"{address}"}}"#));
            assert_eq!(config.check().is_ok(), fine, "{address}");
        }
    }

    #[test]
    fn an_interface_that_cannot_reach_it_is_named() {
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
    fn an_unknown_version_is_refused() {
        let error = serde_json::from_str::<MmdsConfig>(r#"{"version":"V3","network_interfaces":["a"]}"#);
        assert!(error.unwrap_err().to_string().contains("V3"));
    }
}
