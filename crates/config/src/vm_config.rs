//! A whole microVM in one JSON object: the configuration file, and the response to `GET
//! /vm/config`.
//!
//! The keys are Firecracker's (`kebab-case`); `serial` is an extension. The response to `GET
//! /vm/config` is a valid configuration file once it has a boot source. Sections of unsupported
//! devices must be empty ([`Absent`]).

use serde::{Deserialize, Serialize};

use crate::absent::{Absent, AbsentList, Unsupported};
use crate::boot_source::BootSource;
use crate::cpu_config::{CpuConfig, CpuConfigSource};
use crate::drive::{Drive, check_drives};
use crate::entropy::Entropy;
use crate::error::ConfigError;
use crate::logger::Logger;
use crate::machine_config::MachineConfig;
use crate::metrics::Metrics;
use crate::mmds::MmdsConfig;
use crate::network::{NetworkInterface, check_networks};
use crate::serde_helpers::null_is_default;
use crate::serial::Serial;
use crate::token_bucket::RateLimiter;
use crate::vsock::Vsock;

/// The configuration file (`--config-file`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// Kernel, initrd and command line. The only required key.
    pub boot_source: BootSource,
    /// vCPUs and memory.
    #[serde(default, deserialize_with = "null_is_default")]
    pub machine_config: MachineConfig,
    /// Log of the monitor; set by the command line if absent.
    #[serde(default)]
    pub logger: Option<Logger>,
    /// Serial console; standard input and output if absent.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// Block devices, in the guest's order, except that the root device comes first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub drives: Vec<Drive>,
    /// Entropy device; none if absent.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// Vsock device; none if absent.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// Metadata service; none if absent or without interfaces.
    #[serde(default, deserialize_with = "MmdsConfig::deserialize_in_file")]
    pub mmds_config: Option<MmdsConfig>,
    /// Network devices, in the guest's order.
    #[serde(default, deserialize_with = "null_is_default")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::balloon")]
    pub balloon: Absent,
    /// Custom CPU template, or its file; none if absent.
    #[serde(default)]
    pub cpu_config: Option<CpuConfigSource>,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::memory_hotplug")]
    pub memory_hotplug: Absent,
    /// Output of metrics; set by the command line if absent.
    #[serde(default)]
    pub metrics: Option<Metrics>,
    /// Not supported.
    #[serde(default, deserialize_with = "Unsupported::pmem")]
    pub pmem: AbsentList,
}

impl VmConfig {
    /// Checks bounds and combinations of every section.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.boot_source.check()?;
        self.machine_config.check()?;
        self.logger.as_ref().map_or(Ok(()), Logger::check)?;
        self.metrics.as_ref().map_or(Ok(()), Metrics::check)?;
        self.cpu_config.as_ref().map_or(Ok(()), CpuConfigSource::check)?;
        self.serial.as_ref().map_or(Ok(()), Serial::check)?;
        self.entropy.as_ref().map_or(Ok(()), Entropy::check)?;
        self.vsock.as_ref().map_or(Ok(()), Vsock::check)?;
        self.mmds_config.as_ref().map_or(Ok(()), MmdsConfig::check)?;
        check_drives(&self.drives)?;
        check_networks(&self.network_interfaces)?;
        self.mmds_config.as_ref().map_or(Ok(()), |mmds| mmds.check_interfaces(&self.network_interfaces))
    }
}

/// The response to `GET /vm/config`: the keys of the configuration file, any of which may be unset.
///
/// An unset key is null. An unset `serial` is omitted, as Firecracker has no such key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case", default)]
pub struct FullVmConfig {
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::balloon")]
    pub balloon: Absent,
    /// Kernel, initrd and command line, once set.
    pub boot_source: Option<BootSource>,
    /// Custom CPU template.
    pub cpu_config: Option<CpuConfig>,
    /// Block devices.
    pub drives: Vec<Drive>,
    /// Entropy device.
    pub entropy: Option<Entropy>,
    /// Log of the monitor, if set by the API or the configuration file.
    pub logger: Option<Logger>,
    /// vCPUs and memory.
    pub machine_config: MachineConfig,
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::memory_hotplug")]
    pub memory_hotplug: Absent,
    /// Output of metrics, however it was set. No snapshot has it.
    pub metrics: Option<Metrics>,
    /// Metadata service.
    pub mmds_config: Option<MmdsConfig>,
    /// Network devices.
    pub network_interfaces: Vec<NetworkInterface>,
    /// Not supported.
    #[serde(deserialize_with = "Unsupported::pmem")]
    pub pmem: AbsentList,
    /// Serial console, if set by the API or the configuration file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub serial: Option<Serial>,
    /// Vsock device.
    pub vsock: Option<Vsock>,
}

impl FullVmConfig {
    /// Shows what is in force: no buckets that limit nothing, and the default address of the
    /// metadata service where none was set.
    #[must_use]
    pub fn in_force(mut self) -> FullVmConfig {
        let networks = self.network_interfaces.iter_mut();
        let networks =
            networks.flat_map(|network| [&mut network.rx_rate_limiter, &mut network.tx_rate_limiter]);
        let drives = self.drives.iter_mut().map(|drive| &mut drive.rate_limiter);
        let entropy = self.entropy.iter_mut().map(|entropy| &mut entropy.rate_limiter);
        for limiter in networks.chain(drives).chain(entropy) {
            *limiter = limiter.and_then(RateLimiter::in_force);
        }
        if let Some(serial) = &mut self.serial {
            serial.rate_limiter = serial.rate_limiter.filter(|bucket| !bucket.is_unlimited());
        }
        if let Some(mmds) = &mut self.mmds_config {
            mmds.ipv4_address = Some(mmds.address());
        }
        self
    }
}

/// A CPU template that is still in a file is left out.
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
            cpu_config: cpu_config.and_then(CpuConfigSource::inline),
            memory_hotplug,
            metrics,
            pmem,
        }
    }
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
            cpu_config: None,
            memory_hotplug: Absent,
            metrics: None,
            pmem: AbsentList,
        }
    }

    #[test]
    fn boot_source_is_the_only_required_section() {
        assert_eq!(parse(r#"{"boot-source":{"kernel_image_path":"vmlinux"}}"#), Ok(minimal()));
    }

    #[test]
    fn null_means_absent_except_for_the_boot_source() {
        let nulls = r#""machine-config":null,"logger":null,"cpu-config":null,"serial":null,"drives":null"#;
        assert_eq!(
            parse(&format!(r#"{{"boot-source":{{"kernel_image_path":"vmlinux"}},{nulls}}}"#)),
            Ok(minimal())
        );
        assert!(parse(r#"{"boot-source":null}"#).is_err());
    }

    #[test]
    fn empty_sections_of_unsupported_devices_are_accepted() {
        for empty in [
            r#""balloon":null,"pmem":[],"memory-hotplug":null"#,
            r#""balloon":{},"pmem":null,"memory-hotplug":{}"#,
        ] {
            let json = format!(r#"{{"boot-source":{{"kernel_image_path":"vmlinux"}},{empty}}}"#);
            assert_eq!(parse(&json), Ok(minimal()));
        }
    }

    #[test]
    fn sections_of_unsupported_devices_are_refused_by_name() {
        for (section, content) in [
            ("balloon", r#"{"amount_mib":1,"deflate_on_oom":false}"#),
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
    fn missing_boot_source_is_named() {
        let error = parse(r#"{"drives":[]}"#).unwrap_err();
        assert!(error.contains("`boot-source`"), "{error}");
    }

    #[test]
    fn unknown_key_is_named_at_every_depth() {
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
    fn duplicate_drives_and_root_devices_are_named() {
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
    fn check_covers_every_section() {
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
    fn unset_configuration_shows_nulls_and_defaults() {
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
        fn vm_config_response_is_a_configuration_file(config in crate::testing::vm_config()) {
            prop_assert_eq!(config.check(), Ok(()));
            let shown = serde_json::to_string(&FullVmConfig::from(config.clone())).unwrap();
            prop_assert_eq!(parse(&shown), Ok(config));
        }

        #[test]
        fn what_is_in_force_is_a_configuration_file(config in crate::testing::vm_config()) {
            let shown = FullVmConfig::from(config).in_force();
            let text = serde_json::to_string(&shown).unwrap();
            prop_assert!(!text.contains("\"size\":0,") && !text.contains("\"ipv4_address\":null"), "{}", text);
            prop_assert_eq!(FullVmConfig::from(parse(&text).unwrap()).in_force(), shown);
        }

        #[test]
        fn parsing_never_panics(text in "\\PC*") {
            let _ = parse(&text);
        }
    }
}
