//! [`Metadata`]: the metadata service as its user sees it. Contents can be set at any time, the way
//! to them only before the guest starts.
//!
//! The contents belong to the process, not to the machine. They can be set before anything else,
//! and no snapshot has them.

use std::sync::Arc;

use config::{MmdsConfig, MmdsVersion, NetworkInterface};
use mmds::{Service, SharedStore};
use serde_json::Value;

use crate::CommandError;

/// The contents of the metadata service, and how the guest reaches it.
#[derive(Debug)]
pub(crate) struct Metadata {
    store: SharedStore,
    /// `None` while the guest has no interface that answers metadata requests.
    config: Option<MmdsConfig>,
}

impl Metadata {
    /// No contents yet; at most `limit` bytes of JSON fit.
    pub(crate) fn new(limit: usize) -> Metadata {
        Metadata { store: SharedStore::new(limit), config: None }
    }

    /// Lets the guest reach the service through some of these interfaces.
    pub(crate) fn configure(
        &mut self,
        config: &MmdsConfig,
        interfaces: &[NetworkInterface],
    ) -> Result<(), CommandError> {
        config.check()?;
        config.check_interfaces(interfaces)?;
        if config.version == MmdsVersion::V1 {
            log::warn!("MMDS version V1 answers any process in the guest; V2 requires a token");
        }
        self.config = Some(config.clone());
        Ok(())
    }

    /// The contents. Once the guest has `started`, this and all changes need a way for it to reach
    /// them.
    pub(crate) fn get(&self, started: bool) -> Result<Value, CommandError> {
        self.check_reachable(started)?;
        Ok(self.store.get())
    }

    /// Replaces the contents.
    pub(crate) fn put(&self, contents: Value, started: bool) -> Result<(), CommandError> {
        self.check_reachable(started)?;
        Ok(self.store.put(contents)?)
    }

    /// Merges `patch` into the contents (RFC 7396).
    pub(crate) fn patch(&self, patch: Value, started: bool) -> Result<(), CommandError> {
        self.check_reachable(started)?;
        Ok(self.store.patch(patch)?)
    }

    /// These contents with the configuration of a saved microVM.
    pub(crate) fn with_config(&self, config: Option<&MmdsConfig>) -> Metadata {
        Metadata { store: self.store.clone(), config: config.cloned() }
    }

    /// The metadata of a fork's child: `contents`, else a copy of these, which neither shares with
    /// the other. Contents that the child could not reach are refused.
    pub(crate) fn child(&self, contents: Option<Value>) -> Result<Metadata, CommandError> {
        self.check_reachable(contents.is_some())?;
        let store = self.store.deep_clone();
        contents.map_or(Ok(()), |contents| store.put(contents))?;
        Ok(Metadata { store, config: self.config.clone() })
    }

    /// The service for a guest that starts now, or continues from a saved state: with new tokens.
    pub(crate) fn service(&self, vm_id: &str) -> Option<Arc<Service>> {
        let config = self.config.as_ref()?;
        let mut key = [0; 32];
        // Up to 256 bytes come at once and uninterrupted, once the kernel's generator is seeded.
        // Until then a signal may interrupt the call.
        while rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty()) != Ok(key.len()) {}
        Some(Service::new(config.clone(), self.store.clone(), vm_id, &key))
    }

    fn check_reachable(&self, needed: bool) -> Result<(), CommandError> {
        if needed && self.config.is_none() { Err(CommandError::NoMmds) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn interface() -> NetworkInterface {
        serde_json::from_value(json!({"iface_id":"eth0","host_dev_name":"tap0"})).unwrap()
    }

    fn config(interface: &str) -> MmdsConfig {
        MmdsConfig {
            version: MmdsVersion::V2,
            network_interfaces: vec![interface.to_owned()],
            ipv4_address: None,
            imds_compat: false,
        }
    }

    #[test]
    fn contents_after_the_start_need_a_configured_interface() {
        let mut metadata = Metadata::new(100);
        assert_eq!(metadata.get(false).unwrap(), json!({}));
        metadata.put(json!({"a":1}), false).unwrap();
        assert!(metadata.get(true).unwrap_err().to_string().contains("cannot reach MMDS"));
        assert!(metadata.put(json!({}), true).is_err() && metadata.patch(json!({}), true).is_err());
        metadata.configure(&config("eth0"), &[interface()]).unwrap();
        metadata.patch(json!({"b":2}), true).unwrap();
        assert_eq!(metadata.get(true).unwrap(), json!({"a":1,"b":2}));
    }

    #[test]
    fn contents_over_the_limit_have_an_error_of_their_own() {
        let metadata = Metadata::new(10);
        let error = metadata.put(json!({"a":"0123456789"}), false).unwrap_err();
        assert!(error.is_too_large() && error.to_string().contains("at most 10"), "{error}");
        assert!(!metadata.patch(json!({}), false).unwrap_err().is_too_large());
    }

    #[test]
    fn child_starts_with_a_copy_or_with_contents_of_its_own() {
        let mut parent = Metadata::new(20);
        parent.configure(&config("eth0"), &[interface()]).unwrap();
        parent.put(json!({"a":1}), false).unwrap();
        let (same, own) = (parent.child(None).unwrap(), parent.child(Some(json!({"b":2}))).unwrap());
        same.patch(json!({"c":3}), true).unwrap();
        assert_eq!(parent.get(true).unwrap(), json!({"a":1}));
        assert_eq!(same.get(true).unwrap(), json!({"a":1,"c":3}));
        assert_eq!(own.get(true).unwrap(), json!({"b":2}));
        assert!(own.service("child").is_some());
        assert!(parent.child(Some(json!({"a":"0123456789012345"}))).unwrap_err().is_too_large());
        let unreachable = Metadata::new(20);
        let error = unreachable.child(Some(json!({"b":2}))).unwrap_err();
        assert!(error.to_string().contains("cannot reach MMDS"), "{error}");
        assert!(unreachable.child(None).is_ok());
    }

    #[test]
    fn unknown_interface_is_refused() {
        let mut metadata = Metadata::new(100);
        assert!(
            metadata.configure(&config("eth1"), &[interface()]).unwrap_err().to_string().contains("eth1")
        );
        assert!(metadata.service("vm").is_none());
    }
}
