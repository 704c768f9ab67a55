//! A whole microVM in one JSON object: the configuration file, and the answer of `GET /vm/config`.
//!
//! The keys are Firecracker's (`kebab-case`); `serial` is ours. What `GET /vm/config` answers is a configuration file
//! again, once it has a boot source. Sections of devices that vesta does not have must be empty ([`Absent`]).

use serde::{Deserialize, Deserializer, Serialize};

use crate::absent::{Absent, AbsentList, Unsupported};
use crate::{
    BootSource, ConfigError, Drive, Entropy, Logger, MachineConfig, MmdsConfig, NetworkInterface, Serial,
    Vsock, check_networks,
};

/// The configuration file (`--config-file`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// What to boot: the only key that must be there.
    pub boot_source: BootSource,
    /// Processors and memory.
    #[serde(default, deserialize_with = "null_is_default")]
    pub machine_config: MachineConfig,
    /// The log; the command line's settings hold where absent.
    #[serde(default)]
    pub logger: Option<Logger>,
    /// The serial console; standard input and output where absent.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// Block devices, by order of their appearance in the guest, but for the root device, which comes first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub drives: Vec<Drive>,
    /// The entropy device; none where absent.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// The socket device; none where absent.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// The metadata service; none where absent, or where it names no interface.
    #[serde(default, deserialize_with = "MmdsConfig::in_file")]
    pub mmds_config: Option<MmdsConfig>,
    /// Network devices, by order of their appearance in the guest.
    #[serde(default, deserialize_with = "null_is_default")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::balloon")]
    pub balloon: Absent,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::cpu_config")]
    pub cpu_config: Absent,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::memory_hotplug")]
    pub memory_hotplug: Absent,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::metrics")]
    pub metrics: Absent,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::pmem")]
    pub pmem: AbsentList,
}

impl VmConfig {
    /// Checks the bounds of every part.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.boot_source.check()?;
        self.machine_config.check()?;
        self.serial.as_ref().map_or(Ok(()), Serial::check)?;
        self.entropy.as_ref().map_or(Ok(()), Entropy::check)?;
        self.vsock.as_ref().map_or(Ok(()), Vsock::check)?;
        self.mmds_config.as_ref().map_or(Ok(()), MmdsConfig::check)?;
        check_drives(&self.drives)?;
        check_networks(&self.network_interfaces)?;
        self.mmds_config.as_ref().map_or(Ok(()), |mmds| mmds.check_interfaces(&self.network_interfaces))
    }
}

/// Checks each drive, and that they go together: no id twice, one root device at most.
pub fn check_drives(drives: &[Drive]) -> Result<(), ConfigError> {
    let mut root: Option<&Drive> = None;
    for (i, drive) in drives.iter().enumerate() {
        drive.check()?;
        if drives[..i].iter().any(|other| other.drive_id == drive.drive_id) {
            return Err(ConfigError::DuplicateDrive { drive_id: drive.drive_id.clone() });
        }
        if !drive.is_root_device {
            continue;
        }
        if let Some(first) = root.replace(drive) {
            let (first, second) = (first.drive_id.clone(), drive.drive_id.clone());
            return Err(ConfigError::TwoRootDevices { first, second });
        }
    }
    Ok(())
}

/// A microVM's configuration as `GET /vm/config` answers: the configuration file's keys, of which any may be unset.
///
/// What is unset is null; `serial`, which Firecracker does not have there, is then left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FullVmConfig {
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::balloon")]
    pub balloon: Absent,
    /// What to boot, once it is known.
    pub boot_source: Option<BootSource>,
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::cpu_config")]
    pub cpu_config: Absent,
    /// Block devices.
    pub drives: Vec<Drive>,
    /// The entropy device.
    pub entropy: Option<Entropy>,
    /// The log, where the API or the configuration file set it.
    pub logger: Option<Logger>,
    /// Processors and memory.
    pub machine_config: MachineConfig,
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::memory_hotplug")]
    pub memory_hotplug: Absent,
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::metrics")]
    pub metrics: Absent,
    /// The metadata service.
    pub mmds_config: Option<MmdsConfig>,
    /// Network devices.
    pub network_interfaces: Vec<NetworkInterface>,
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::pmem")]
    pub pmem: AbsentList,
    /// The serial console, where the API or the configuration file set it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The socket device.
    pub vsock: Option<Vsock>,
}

impl From<VmConfig> for FullVmConfig {
    fn from(config: VmConfig) -> FullVmConfig {
        let VmConfig {
            boot_source,
            machine_config,
            logger,
            serial,
            drives,
            entropy,
            vsock,
            mmds_config,
            network_interfaces,
            balloon,
            cpu_config,
            memory_hotplug,
            metrics,
            pmem,
        } = config;
        FullVmConfig {
            boot_source: Some(boot_source),
            drives,
            entropy,
            logger,
            machine_config,
            serial,
            vsock,
            mmds_config,
            network_interfaces,
            balloon,
            cpu_config,
            memory_hotplug,
            metrics,
            pmem,
        }
    }
}

/// Reads null as if the key were absent.
pub(crate) fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::TokenBucket;

    fn parse(json: &str) -> Result<VmConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn minimal() -> VmConfig {
        VmConfig {
            boot_source: BootSource {
                kernel_image_path: "vmlinux".into(),
                initrd_path: None,
                boot_args: None,
            },
            machine_config: MachineConfig::default(),
            logger: None,
            serial: None,
            drives: Vec::new(),
            entropy: None,
            vsock: None,
            mmds_config: None,
            network_interfaces: Vec::new(),
            balloon: Absent,
            cpu_config: Absent,
            memory_hotplug: Absent,
            metrics: Absent,
            pmem: AbsentList,
        }
    }

    #[test]
    fn a_kernel_is_all_it_takes() {
        assert_eq!(parse(r#"{"boot-source":{"kernel_image_path":"vmlinux"}}"#), Ok(minimal()));
    }

    #[test]
    fn null_means_absent_except_for_the_boot_source() {
        let nulls = r#""machine-config":null,"logger":null,"serial":null,"drives":null"#;
        assert_eq!(
            parse(&format!(r#"{{"boot-source":{{"kernel_image_path":"vmlinux"}},{nulls}}}"#)),
            Ok(minimal())
        );
        assert!(parse(r#"{"boot-source":null}"#).is_err());
    }

    #[test]
    fn empty_sections_of_missing_devices_are_absent() {
        for empty in [
            r#""cpu-config":null,"balloon":null,"metrics":null,"pmem":[],"memory-hotplug":null"#,
            r#""cpu-config":{},"balloon":{},"metrics":{},"pmem":null,"memory-hotplug":{}"#,
        ] {
            let json = format!(r#"{{"boot-source":{{"kernel_image_path":"vmlinux"}},{empty}}}"#);
            assert_eq!(parse(&json), Ok(minimal()));
        }
    }

    #[test]
    fn sections_of_missing_devices_are_refused_by_name() {
        for (section, content) in [
            ("balloon", r#"{"amount_mib":1,"deflate_on_oom":false}"#),
            ("cpu-config", r#""template.json""#),
            ("cpu-config", r#"{"kvm_capabilities":["121"]}"#),
            ("metrics", r#"{"metrics_path":"m"}"#),
            ("pmem", r#"[{"id":"p","path_on_host":"x"}]"#),
            ("memory-hotplug", r#"{"total_size_mib":1024}"#),
        ] {
            let json =
                format!(r#"{{"boot-source":{{"kernel_image_path":"vmlinux"}},"{section}":{content}}}"#);
            let error = parse(&json).unwrap_err();
            let named = format!("section {section}: this version does not support");
            assert!(error.starts_with(&named), "{error}");
        }
    }

    #[test]
    fn a_missing_boot_source_is_named() {
        let error = parse(r#"{"drives":[]}"#).unwrap_err();
        assert!(error.contains("`boot-source`"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named_wherever_it_stands() {
        for (json, named) in [
            (r#"{"boot-source":{"kernel_image_path":"k"},"network-interface":[]}"#, "`network-interface`"),
            (r#"{"boot-source":{"kernel_image_path":"k","args":""}}"#, "`args`"),
            (
                r#"{"boot-source":{"kernel_image_path":"k"},"machine-config":{"vcpu_count":1,"mem_size_mib":1,"cpus":1}}"#,
                "`cpus`",
            ),
            (r#"{"boot_source":{"kernel_image_path":"k"}}"#, "`boot_source`"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(named), "{json}: {error}");
        }
    }

    #[test]
    fn drives_that_do_not_go_together_are_named() {
        let with = |drives: &str| {
            let json = format!(r#"{{"boot-source":{{"kernel_image_path":"vmlinux"}},"drives":{drives}}}"#);
            parse(&json).unwrap().check().map_err(|error| error.to_string())
        };
        let drive = |id: &str, root: bool| {
            format!(r#"{{"drive_id":"{id}","path_on_host":"/d","is_root_device":{root}}}"#)
        };
        assert_eq!(with("[]"), Ok(()));
        assert_eq!(with(&format!("[{},{}]", drive("a", true), drive("b", false))), Ok(()));
        let twice = with(&format!("[{},{}]", drive("a", true), drive("a", false))).unwrap_err();
        assert!(twice.contains("drive_id a"), "{twice}");
        let roots = with(&format!("[{},{}]", drive("a", true), drive("b", true))).unwrap_err();
        assert!(roots.contains("a and b"), "{roots}");
    }

    #[test]
    fn checking_reaches_every_part() {
        let mut config = minimal();
        config.machine_config.vcpu_count = 0;
        assert!(config.check().is_err());
        let mut config = minimal();
        config.boot_source.boot_args = Some("x".repeat(crate::MAX_BOOT_ARGS_LEN));
        assert!(config.check().is_err());
        let mut config = minimal();
        let bucket = TokenBucket { size: 1, one_time_burst: None, refill_time: u64::MAX };
        config.serial = Some(Serial { serial_out_path: None, rate_limiter: Some(bucket) });
        assert!(config.check().is_err());
        assert_eq!(minimal().check(), Ok(()));
    }

    #[test]
    fn an_unset_configuration_shows_nulls_and_defaults() {
        assert_eq!(
            serde_json::to_value(FullVmConfig::default()).unwrap(),
            serde_json::json!({
                "boot-source": null,
                "drives": [],
                "entropy": null,
                "logger": null,
                "machine-config": {
                    "vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false, "huge_pages": "None",
                },
                "vsock": null,
                "mmds-config": null,
                "network-interfaces": [],
                "balloon": null,
                "cpu-config": null,
                "memory-hotplug": null,
                "metrics": null,
                "pmem": [],
            })
        );
    }

    proptest! {
        #[test]
        fn what_the_api_shows_is_a_configuration_file_again(config in crate::testing::vm_config()) {
            prop_assert_eq!(config.check(), Ok(()));
            let shown = serde_json::to_string(&FullVmConfig::from(config.clone())).unwrap();
            prop_assert_eq!(parse(&shown), Ok(config));
        }

        #[test]
        fn no_text_makes_reading_panic(text in "\\PC*") {
            let _ = parse(&text);
        }
    }
}
