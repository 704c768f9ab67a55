//! `/machine-config`: processors and memory.

use serde::{Deserialize, Serialize};

use crate::ConfigError;

/// Most vCPUs of one microVM.
pub const MAX_VCPU_COUNT: u8 = 128;
/// Most memory of one microVM: 1 TiB.
pub const MAX_MEM_SIZE_MIB: u32 = 1 << 20;

/// Processors and memory of a microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPU_COUNT`]; with `smt`, 1 or even.
    pub vcpu_count: u8,
    /// Memory in MiB, 1 to [`MAX_MEM_SIZE_MIB`]; with 2 MiB pages, a multiple of 2.
    pub mem_size_mib: u32,
    /// Whether two vCPUs are shown as the threads of one core. (`ht_enabled` is its name before Firecracker 0.25.)
    #[serde(default, alias = "ht_enabled")]
    pub smt: bool,
    /// A CPU template by name; deprecated in the API, and absent unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether pages that the guest writes are logged, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The pages that back guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
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
        Ok(())
    }

    /// This configuration with the fields of `update` in place of its own, checked.
    pub fn updated(&self, update: &MachineConfigUpdate) -> Result<MachineConfig, ConfigError> {
        let new = MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: update.smt.unwrap_or(self.smt),
            cpu_template: update.cpu_template.or(self.cpu_template),
            track_dirty_pages: update.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(self.huge_pages),
        };
        new.check()?;
        Ok(new)
    }
}

/// The body of `PATCH /machine-config`: what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// See [`MachineConfig::vcpu_count`].
    #[serde(default)]
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfig::mem_size_mib`].
    #[serde(default)]
    pub mem_size_mib: Option<u32>,
    /// See [`MachineConfig::smt`].
    #[serde(default, alias = "ht_enabled")]
    pub smt: Option<bool>,
    /// See [`MachineConfig::cpu_template`].
    #[serde(default)]
    pub cpu_template: Option<CpuTemplate>,
    /// See [`MachineConfig::track_dirty_pages`].
    #[serde(default)]
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfig::huge_pages`].
    #[serde(default)]
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigUpdate {
    /// Whether it changes nothing, which the API refuses.
    pub fn is_empty(&self) -> bool {
        *self == MachineConfigUpdate::default()
    }
}

/// The pages that back guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary pages; huge ones only where the host uses them for everyone.
    #[default]
    None,
    /// Ordinary pages that the kernel may merge into huge ones.
    Transparent,
    /// 2 MiB pages from the host's pool (hugetlbfs), reserved when the guest starts.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// The names of Firecracker's static CPU templates. They are accepted for the sake of clients that always send one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Arm Neoverse V1 as N1.
    V1N1,
    /// No template.
    None,
}

/// Whether `value` lies between `min` and `max`, both included.
fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange { field, value, min, max })
    }
}
