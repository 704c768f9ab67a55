//! `/machine-config`: vCPUs and memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks::{in_range, socket_path};
use crate::error::ConfigError;
#[cfg(feature = "schema")]
use crate::limits::MAX_SOCKET_PATH_LEN;
use crate::limits::{MAX_MEM_SIZE_MIB, MAX_VCPU_COUNT};
use crate::serde_helpers::null_is_default;

/// vCPUs and memory of a microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPU_COUNT`]; with `smt`, 1 or even.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_VCPU_COUNT)))]
    pub vcpu_count: u8,
    /// Memory in MiB, 1 to [`MAX_MEM_SIZE_MIB`]; with 2 MiB pages, a multiple of 2.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_MEM_SIZE_MIB)))]
    pub mem_size_mib: u32,
    /// Whether each pair of vCPUs appears as the threads of one core. Firecracker before 0.25 calls
    /// it `ht_enabled`.
    #[serde(default, alias = "ht_enabled")]
    #[cfg_attr(feature = "schema", schemars(extend("x-alias" = "ht_enabled")))]
    pub smt: bool,
    /// Name of a CPU template. Deprecated in the API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("deprecated" = true)))]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether pages that the guest writes are tracked, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Pages that back guest memory.
    #[serde(default, deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<HugePages>"))]
    pub huge_pages: HugePages,
    /// Unix socket at which a debugger attaches to the guest, which waits for it at its entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_SOCKET_PATH_LEN), extend("x-vesta-extension" = true)))]
    pub gdb_socket_path: Option<PathBuf>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            gdb_socket_path: None,
        }
    }
}

impl MachineConfig {
    /// Checks bounds and combinations.
    pub fn check(&self) -> Result<(), ConfigError> {
        in_range("vcpu_count", self.vcpu_count.into(), 1, MAX_VCPU_COUNT.into())?;
        in_range("mem_size_mib", self.mem_size_mib.into(), 1, MAX_MEM_SIZE_MIB.into())?;
        if self.smt && self.vcpu_count > 1 && self.vcpu_count % 2 == 1 {
            return Err(ConfigError::OddVcpusWithSmt { vcpu_count: self.vcpu_count });
        }
        if self.huge_pages == HugePages::Hugetlbfs2M && self.mem_size_mib % 2 == 1 {
            return Err(ConfigError::OddMemoryWithHugePages { mem_size_mib: self.mem_size_mib });
        }
        if self.cpu_template == Some(CpuTemplate::V1N1) {
            return Err(ConfigError::ForeignCpuTemplate { template: "V1N1" });
        }
        self.gdb_socket_path.iter().try_for_each(|path| socket_path("gdb_socket_path", path))
    }

    /// Returns this configuration with the fields of `update`, checked.
    pub fn updated(&self, update: &MachineConfigUpdate) -> Result<MachineConfig, ConfigError> {
        let new = MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: update.smt.unwrap_or(self.smt),
            cpu_template: update.cpu_template.or(self.cpu_template),
            track_dirty_pages: update.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(self.huge_pages),
            gdb_socket_path: update.gdb_socket_path.clone().or_else(|| self.gdb_socket_path.clone()),
        };
        new.check()?;
        Ok(new)
    }
}

/// The body of `PATCH /machine-config`. A field that is absent or null changes nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("minProperties" = 1)))]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// Number of vCPUs; unchanged if absent.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_VCPU_COUNT)))]
    pub vcpu_count: Option<u8>,
    /// Memory in MiB; unchanged if absent.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_MEM_SIZE_MIB)))]
    pub mem_size_mib: Option<u32>,
    /// Whether each pair of vCPUs appears as the threads of one core; unchanged if absent.
    #[serde(default, alias = "ht_enabled")]
    #[cfg_attr(feature = "schema", schemars(extend("x-alias" = "ht_enabled")))]
    pub smt: Option<bool>,
    /// Name of a CPU template; unchanged if absent. Deprecated in the API.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(extend("deprecated" = true)))]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether pages that the guest writes are tracked; unchanged if absent.
    #[serde(default)]
    pub track_dirty_pages: Option<bool>,
    /// Pages that back guest memory; unchanged if absent.
    #[serde(default)]
    pub huge_pages: Option<HugePages>,
    /// Unix socket at which a debugger attaches to the guest; unchanged if absent.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_SOCKET_PATH_LEN), extend("x-vesta-extension" = true)))]
    pub gdb_socket_path: Option<PathBuf>,
}

impl MachineConfigUpdate {
    /// Whether the update has no field. The API refuses such an update.
    pub fn is_empty(&self) -> bool {
        *self == MachineConfigUpdate::default()
    }
}

/// Kind of pages that back guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum HugePages {
    /// Normal pages; transparent huge pages only if the host enables them always.
    #[default]
    None,
    /// Transparent huge pages.
    Transparent,
    /// 2 MiB pages from the host's pool (hugetlbfs), reserved at start or restore.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// Names of Firecracker's static CPU templates. They are accepted for clients that always send one,
/// and have no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum CpuTemplate {
    /// Intel, up to C3.
    C3,
    /// Intel, up to T2.
    T2,
    /// Intel, T2 for snapshots across Skylake and Cascade Lake.
    T2S,
    /// Intel Cascade Lake or newer as T2.
    T2CL,
    /// AMD Milan as T2.
    T2A,
    /// Arm Neoverse V1 as N1. Refused: every host is x86_64.
    V1N1,
    /// No template.
    None,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(json: &str) -> Result<MachineConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn with(vcpu_count: u8, mem_size_mib: u32) -> MachineConfig {
        MachineConfig { vcpu_count, mem_size_mib, ..MachineConfig::default() }
    }

    #[test]
    fn vcpus_and_memory_are_required_and_the_rest_has_defaults() {
        assert_eq!(parse(r#"{"vcpu_count":2,"mem_size_mib":256}"#), Ok(with(2, 256)));
        let nulls = r#"{"vcpu_count":2,"mem_size_mib":256,"cpu_template":null,"huge_pages":null}"#;
        assert_eq!(parse(nulls), Ok(with(2, 256)));
        for (json, missing) in
            [(r#"{"vcpu_count":2}"#, "`mem_size_mib`"), (r#"{"mem_size_mib":2}"#, "`vcpu_count`")]
        {
            let error = parse(json).unwrap_err();
            assert!(error.contains(missing), "{error}");
        }
    }

    #[test]
    fn ht_enabled_is_an_alias_of_smt() {
        let config = parse(r#"{"vcpu_count":2,"mem_size_mib":256,"ht_enabled":true}"#).unwrap();
        assert!(config.smt);
        let update: MachineConfigUpdate = serde_json::from_str(r#"{"ht_enabled":true}"#).unwrap();
        assert_eq!(update.smt, Some(true));
    }

    #[test]
    fn bounds_are_inclusive() {
        for good in [with(1, 1), with(MAX_VCPU_COUNT, MAX_MEM_SIZE_MIB)] {
            assert_eq!(good.check(), Ok(()));
        }
        for (bad, field, value) in [
            (with(0, 128), "vcpu_count", 0),
            (with(MAX_VCPU_COUNT + 1, 128), "vcpu_count", 129),
            (with(1, 0), "mem_size_mib", 0),
            (with(1, MAX_MEM_SIZE_MIB + 1), "mem_size_mib", 1048577),
        ] {
            let error = bad.check().unwrap_err();
            let ConfigError::OutOfRange { field: named, value: given, .. } = error else { panic!("{error}") };
            assert_eq!((named, given), (field, value));
        }
    }

    #[test]
    fn number_that_does_not_fit_its_type_is_refused() {
        for json in [
            r#"{"vcpu_count":256,"mem_size_mib":1}"#,
            r#"{"vcpu_count":-1,"mem_size_mib":1}"#,
            r#"{"vcpu_count":1,"mem_size_mib":4294967296}"#,
            r#"{"vcpu_count":1.5,"mem_size_mib":1}"#,
        ] {
            assert!(parse(json).is_err(), "{json}");
        }
    }

    #[test]
    fn cpu_template_of_another_architecture_is_refused() {
        let config = parse(r#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":"V1N1"}"#).unwrap();
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("V1N1") && error.contains("x86_64"), "{error}");
        let update = serde_json::from_str(r#"{"cpu_template":"V1N1"}"#).unwrap();
        assert!(MachineConfig::default().updated(&update).is_err());
    }

    #[test]
    fn invalid_update_is_refused_as_a_whole() {
        let before = MachineConfig { smt: true, ..with(2, 128) };
        let update = MachineConfigUpdate { vcpu_count: Some(3), ..MachineConfigUpdate::default() };
        assert_eq!(before.updated(&update), Err(ConfigError::OddVcpusWithSmt { vcpu_count: 3 }));
        let update =
            MachineConfigUpdate { vcpu_count: Some(3), smt: Some(false), ..MachineConfigUpdate::default() };
        assert_eq!(before.updated(&update), Ok(with(3, 128)));
    }

    #[test]
    fn gdb_socket_is_shown_only_if_set_and_its_length_is_checked() {
        let config = parse(r#"{"vcpu_count":1,"mem_size_mib":1,"gdb_socket_path":"/run/gdb"}"#).unwrap();
        assert_eq!(config.check(), Ok(()));
        assert!(serde_json::to_string(&config).unwrap().contains(r#""gdb_socket_path":"/run/gdb""#));
        assert!(!serde_json::to_string(&with(1, 1)).unwrap().contains("gdb"));
        for len in [0, 108] {
            let update =
                MachineConfigUpdate { gdb_socket_path: Some("x".repeat(len).into()), ..Default::default() };
            let error = with(1, 1).updated(&update).unwrap_err();
            assert_eq!(error, ConfigError::SocketPathLength { field: "gdb_socket_path", len });
        }
    }

    #[test]
    fn empty_update_is_detected() {
        assert!(serde_json::from_str::<MachineConfigUpdate>("{}").unwrap().is_empty());
        assert!(!serde_json::from_str::<MachineConfigUpdate>(r#"{"smt":false}"#).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn smt_accepts_one_or_an_even_number_of_vcpus(vcpu_count in 1..=MAX_VCPU_COUNT) {
            let config = MachineConfig { smt: true, ..with(vcpu_count, 128) };
            prop_assert_eq!(config.check().is_ok(), vcpu_count == 1 || vcpu_count % 2 == 0);
        }

        #[test]
        fn huge_pages_need_even_memory_sizes(mem_size_mib in 1..=MAX_MEM_SIZE_MIB) {
            let config = MachineConfig { huge_pages: HugePages::Hugetlbfs2M, ..with(1, mem_size_mib) };
            prop_assert_eq!(config.check().is_ok(), mem_size_mib % 2 == 0);
        }

        #[test]
        fn update_of_every_field_equals_a_new_configuration(
            vcpu_count: u8, mem_size_mib: u32, smt: bool, track_dirty_pages: bool,
        ) {
            let new = MachineConfig { smt, track_dirty_pages, ..with(vcpu_count, mem_size_mib) };
            let update: MachineConfigUpdate =
                serde_json::from_value(serde_json::to_value(&new).unwrap()).unwrap();
            prop_assert_eq!(MachineConfig::default().updated(&update), new.check().map(|()| new));
        }
    }
}
