//! The metadata service as its user sees it: contents at any time, the way to it before the guest starts.
//!
//! Contents belong to the process, not to the machine: they can be there before anything else is, and no snapshot has them.

use std::sync::Arc;

use config::{MmdsConfig, MmdsVersion, NetworkInterface};
use mmds::store::StoreError;
use mmds::{Service, SharedStore};
use serde_json::Value;

use crate::CommandError;

/// What the user has set of the metadata service.
#[derive(Debug)]
pub(crate) struct Metadata {
    store: SharedStore,
    config: Option<MmdsConfig>,
}

impl Metadata {
    /// Nothing yet; contents may be `limit` bytes long.
    pub(crate) fn new(limit: usize) -> Metadata {
        Metadata { store: SharedStore::new(limit), config: None }
    }

    /// Makes a way to it through some of these interfaces.
    pub(crate) fn configure(
        &mut self,
        config: &MmdsConfig,
        interfaces: &[NetworkInterface],
    ) -> Result<(), CommandError> {
        config.check()?;
        config.check_interfaces(interfaces)?;
        if config.version == MmdsVersion::V1 {
            log::warn!("MMDS version V1 answers whoever asks in the guest; V2 wants a token");
        }
        self.config = Some(config.clone());
        Ok(())
    }

    /// The contents. Once the guest has started they mean something only where there is a way to them.
    pub(crate) fn get(&self, started: bool) -> Result<Value, CommandError> {
        self.check_way(started)?;
        Ok(self.store.get())
    }

    /// Replaces the contents.
    pub(crate) fn put(&self, contents: Value, started: bool) -> Result<(), CommandError> {
        self.check_way(started)?;
        self.store.put(contents).map_err(refused)
    }

    /// Merges into the contents.
    pub(crate) fn patch(&self, patch: Value, started: bool) -> Result<(), CommandError> {
        self.check_way(started)?;
        self.store.patch(patch).map_err(refused)
    }

    /// The same contents with the way that a saved microVM had.
    pub(crate) fn with_way(&self, config: Option<&MmdsConfig>) -> Metadata {
        Metadata { store: self.store.clone(), config: config.cloned() }
    }

    /// What a fork's child begins with: the same way, and these contents or else the same. From then on they are its own. Contents to which
    /// there is no way are refused, as for a guest that has started.
    pub(crate) fn child(&self, contents: Option<Value>) -> Result<Metadata, CommandError> {
        if contents.is_some() && self.config.is_none() {
            return Err(CommandError::new(
                "mmds is given, and the guest cannot reach MMDS: it had no /mmds/config",
            ));
        }
        let store = self.store.deep_clone();
        contents.map_or(Ok(()), |contents| store.put(contents)).map_err(refused)?;
        Ok(Metadata { store, config: self.config.clone() })
    }

    /// The service for a guest that starts now, or goes on from a saved state: with new tokens.
    pub(crate) fn service(&self, vm_id: &str) -> Option<Arc<Service>> {
        let config = self.config.as_ref()?;
        let mut key = [0; 32];
        // Up to 256 bytes come at once and uninterrupted, once the kernel has had its first randomness; until then a signal may come.
        while rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty()) != Ok(key.len()) {}
        Some(Service::new(config.clone(), self.store.clone(), vm_id, &key))
    }

    fn check_way(&self, started: bool) -> Result<(), CommandError> {
        if started && self.config.is_none() {
            return Err(CommandError::new(
                "this guest cannot reach MMDS: PUT /mmds/config named no network interface before it started",
            ));
        }
        Ok(())
    }
}

fn refused(error: StoreError) -> CommandError {
    match error {
        StoreError::TooLarge { .. } => CommandError::too_large(error),
        StoreError::NotInitialized | StoreError::NotAnObject(_) => CommandError::new(error),
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
    fn contents_come_before_or_after_the_start() {
        let mut metadata = Metadata::new(100);
        assert_eq!(metadata.get(false), Ok(json!({})));
        metadata.put(json!({"a":1}), false).unwrap();
        assert!(metadata.get(true).unwrap_err().to_string().contains("cannot reach MMDS"));
        assert!(metadata.put(json!({}), true).is_err() && metadata.patch(json!({}), true).is_err());
        metadata.configure(&config("eth0"), &[interface()]).unwrap();
        metadata.patch(json!({"b":2}), true).unwrap();
        assert_eq!(metadata.get(true), Ok(json!({"a":1,"b":2})));
    }

    #[test]
    fn contents_over_the_limit_are_told_apart() {
        let metadata = Metadata::new(10);
        let error = metadata.put(json!({"a":"0123456789"}), false).unwrap_err();
        assert!(error.is_too_large() && error.to_string().contains("at most 10"), "{error}");
        assert!(!metadata.patch(json!({}), false).unwrap_err().is_too_large());
    }

    #[test]
    fn a_child_has_its_parents_contents_or_its_own_and_changes_nobody_elses() {
        let mut parent = Metadata::new(20);
        parent.configure(&config("eth0"), &[interface()]).unwrap();
        parent.put(json!({"a":1}), false).unwrap();
        let (same, own) = (parent.child(None).unwrap(), parent.child(Some(json!({"b":2}))).unwrap());
        same.patch(json!({"c":3}), true).unwrap();
        assert_eq!(parent.get(true), Ok(json!({"a":1})));
        assert_eq!(same.get(true), Ok(json!({"a":1,"c":3})));
        assert_eq!(own.get(true), Ok(json!({"b":2})));
        assert!(own.service("child").is_some());
        assert!(parent.child(Some(json!({"a":"0123456789012345"}))).unwrap_err().is_too_large());
        let without_way = Metadata::new(20);
        let error = without_way.child(Some(json!({"b":2}))).unwrap_err();
        assert!(error.to_string().contains("mmds is given"), "{error}");
        assert!(without_way.child(None).is_ok());
    }

    #[test]
    fn a_way_through_an_interface_that_is_not_there_is_none() {
        let mut metadata = Metadata::new(100);
        assert!(
            metadata.configure(&config("eth1"), &[interface()]).unwrap_err().to_string().contains("eth1")
        );
        assert!(metadata.service("vm").is_none());
    }
}
