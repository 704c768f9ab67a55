//! `/cpu-config`: a custom CPU template, in Firecracker's JSON.
//!
//! A template changes bits of what a guest's vCPUs show: of CPUID, and of model-specific registers
//! (MSRs). It may also add KVM capabilities that the host must have, and remove some that the
//! monitor would require.
//!
//! # Text forms
//!
//! | value | form |
//! |---|---|
//! | `leaf`, `subleaf`, `addr` | a string: `0x` and hexadecimal digits, or `0b` and binary digits; at most 32 bits |
//! | `bitmap` | a string ([`Bitmap`]) |
//! | capability | a string: a decimal number to require it, `!` and a number not to require it |
//!
//! As everywhere in this crate, unknown fields are refused at every depth. So are `reg_modifiers`
//! and `vcpu_features`, which are for aarch64.

mod bitmap;
mod text;

use std::fmt;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

pub use bitmap::{Bitmap, BitmapError};
pub use text::{CapabilityError, KvmCapability};

use crate::checks::in_range;
use crate::error::ConfigError;
use crate::limits::MAX_TEMPLATE_ENTRIES;

/// A number of a template: hexadecimal or binary, of at most 32 bits.
#[cfg(feature = "schema")]
const NUMBER: &str = "^(0x0*[0-9A-Fa-f]{1,8}|0b0*[01]{1,32})$";

/// A custom CPU template. The default changes nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// KVM capabilities to require beside the monitor's own, or not to require.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_TEMPLATE_ENTRIES)))]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID, applied in order.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_TEMPLATE_ENTRIES)))]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of MSRs, applied in order.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_TEMPLATE_ENTRIES)))]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes of one leaf of CPUID. The host must have the leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf: `eax` of the instruction.
    #[serde(serialize_with = "text::hex", deserialize_with = "text::leaf")]
    #[cfg_attr(feature = "schema", schemars(with = "String", regex(pattern = NUMBER)))]
    pub leaf: u32,
    /// The subleaf: `ecx` of the instruction. 0 if the leaf has only one.
    #[serde(serialize_with = "text::hex", deserialize_with = "text::subleaf")]
    #[cfg_attr(feature = "schema", schemars(with = "String", regex(pattern = NUMBER)))]
    pub subleaf: u32,
    /// KVM's flags of the leaf, 0 to 7. Bit 0: the leaf has several subleaves.
    #[cfg_attr(feature = "schema", schemars(range(max = 7)))]
    pub flags: u32,
    /// Changes of its registers, applied in order.
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_TEMPLATE_ENTRIES)))]
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of one register of a leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// The register.
    pub register: CpuidRegister,
    /// Its new bits.
    pub bitmap: Bitmap<32>,
}

/// A register that CPUID returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// The register `eax`.
    Eax,
    /// The register `ebx`.
    Ebx,
    /// The register `ecx`.
    Ecx,
    /// The register `edx`.
    Edx,
}

impl CpuidRegister {
    /// All registers, in order.
    pub const ALL: [CpuidRegister; 4] =
        [CpuidRegister::Eax, CpuidRegister::Ebx, CpuidRegister::Ecx, CpuidRegister::Edx];

    /// The register's name.
    pub fn name(self) -> &'static str {
        ["eax", "ebx", "ecx", "edx"][self as usize]
    }
}

/// A change of a model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// The register's address.
    #[serde(serialize_with = "text::hex", deserialize_with = "text::addr")]
    #[cfg_attr(feature = "schema", schemars(with = "String", regex(pattern = NUMBER)))]
    pub addr: u32,
    /// Its new bits.
    pub bitmap: Bitmap<64>,
}

impl CpuConfig {
    /// Checks the lengths of lists, and the flags.
    pub fn check(&self) -> Result<(), ConfigError> {
        fn bounded(list: &'static str, count: usize) -> Result<(), ConfigError> {
            if count <= MAX_TEMPLATE_ENTRIES {
                return Ok(());
            }
            Err(ConfigError::TemplateEntries { list, count })
        }
        bounded("kvm_capabilities", self.kvm_capabilities.len())?;
        bounded("cpuid_modifiers", self.cpuid_modifiers.len())?;
        bounded("msr_modifiers", self.msr_modifiers.len())?;
        for leaf in &self.cpuid_modifiers {
            bounded("modifiers", leaf.modifiers.len())?;
            in_range("flags", leaf.flags.into(), 0, 7)?;
        }
        Ok(())
    }

    /// Whether the template changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == CpuConfig::default()
    }
}

/// The section `cpu-config` of a configuration file: a template, or the file that has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuConfigSource {
    /// The path of a file with a template as JSON.
    File(PathBuf),
    /// The template.
    Inline(CpuConfig),
}

impl CpuConfigSource {
    /// Checks the template, or the path of its file.
    pub fn check(&self) -> Result<(), ConfigError> {
        match self {
            CpuConfigSource::File(path) => crate::checks::path("cpu-config", path),
            CpuConfigSource::Inline(template) => template.check(),
        }
    }

    /// The template, unless it is in a file.
    pub fn inline(self) -> Option<CpuConfig> {
        match self {
            CpuConfigSource::File(_) => None,
            CpuConfigSource::Inline(template) => Some(template),
        }
    }
}

impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PathOrTemplate;

        impl<'de> Visitor<'de> for PathOrTemplate {
            type Value = CpuConfigSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the path of a CPU template or the template")
            }

            fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<CpuConfigSource, E> {
                Ok(CpuConfigSource::File(path.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfigSource, A::Error> {
                CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(CpuConfigSource::Inline)
            }
        }

        deserializer.deserialize_any(PathOrTemplate)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(json: &str) -> Result<CpuConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn template_reads_every_form_of_firecracker() {
        let template = parse(
            r#"{
                "kvm_capabilities": ["121", "!56"],
                "cpuid_modifiers": [{
                    "leaf": "0x80000001", "subleaf": "0b000111", "flags": 1,
                    "modifiers": [
                        {"register": "eax", "bitmap": "0bx00100xxx1xxxxxxxxxxxxxxxxxxxxx1"},
                        {"register": "edx", "bitmap": "0b1"}
                    ]
                }],
                "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b0000_1111_xxxx"}]
            }"#,
        )
        .unwrap();
        assert_eq!(template.kvm_capabilities, [KvmCapability::Require(121), KvmCapability::Ignore(56)]);
        let leaf = &template.cpuid_modifiers[0];
        assert_eq!((leaf.leaf, leaf.subleaf, leaf.flags), (0x8000_0001, 7, 1));
        assert_eq!(leaf.modifiers[0].register, CpuidRegister::Eax);
        assert_eq!(leaf.modifiers[1].bitmap, Bitmap::new(1, 1));
        assert_eq!(template.msr_modifiers[0].bitmap, Bitmap::new(0xff0, 0xf0));
        assert_eq!(template.check(), Ok(()));
    }

    #[test]
    fn template_is_written_as_firecracker_writes_it() {
        let template = CpuConfig {
            kvm_capabilities: vec![KvmCapability::Ignore(56)],
            cpuid_modifiers: vec![CpuidModifier {
                leaf: 0xd,
                subleaf: 0x1,
                flags: 1,
                modifiers: vec![RegisterModifier { register: CpuidRegister::Ecx, bitmap: Bitmap::new(3, 1) }],
            }],
            msr_modifiers: vec![MsrModifier { addr: 0xc000_0080, bitmap: Bitmap::exactly(1) }],
        };
        let written = serde_json::to_value(template).unwrap();
        let register = json!({"register": "ecx", "bitmap": format!("0b{}01", "x".repeat(30))});
        assert_eq!(
            written,
            json!({
                "kvm_capabilities": ["!56"],
                "cpuid_modifiers": [{"leaf": "0xd", "subleaf": "0x1", "flags": 1, "modifiers": [register]}],
                "msr_modifiers": [{"addr": "0xc0000080", "bitmap": format!("0b{}1", "0".repeat(63))}],
            })
        );
    }

    #[test]
    fn invalid_template_is_refused_with_field_and_bound() {
        let leaf = |leaf: &str| {
            format!(r#"{{"cpuid_modifiers":[{{"leaf":{leaf},"subleaf":"0x0","flags":0,"modifiers":[]}}]}}"#)
        };
        let register = |register: &str| {
            format!(
                r#"{{"cpuid_modifiers":[{{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{register}]}}]}}"#
            )
        };
        for (json, named) in [
            (leaf("\"1\""), "leaf is \"1\"; it must be a hexadecimal number"),
            (leaf("\"0x\""), "leaf is \"0x\""),
            (leaf("\"0x100000000\""), "at most 32 bits"),
            (leaf("1"), "expected a string"),
            (register(r#"{"register":"eip","bitmap":"0b1"}"#), "`eip`"),
            (register(r#"{"register":"eax","bitmap":"0b2"}"#), "'2' is no bit"),
            (register(r#"{"register":"eax"}"#), "`bitmap`"),
            (register(r#"{"register":"eax","bitmap":"0b1","comment":""}"#), "`comment`"),
            (r#"{"msr_modifiers":[{"addr":"10a","bitmap":"0b1"}]}"#.to_owned(), "addr is \"10a\""),
            (r#"{"kvm_capabilities":["!x"]}"#.to_owned(), "kvm_capabilities has \"!x\""),
            (r#"{"kvm_capabilities":["4294967296"]}"#.to_owned(), "at most 4294967295"),
            (r#"{"reg_modifiers":[]}"#.to_owned(), "`reg_modifiers`"),
            (r#"{"vcpu_features":[]}"#.to_owned(), "`vcpu_features`"),
        ] {
            let error = parse(&json).unwrap_err();
            assert!(error.contains(named) && error.contains("line 1 column"), "{json}: {error}");
        }
    }

    #[test]
    fn lists_and_flags_have_bounds() {
        let leaf = |flags, modifiers| CpuidModifier { leaf: 1, subleaf: 0, flags, modifiers };
        let msr = MsrModifier { addr: 1, bitmap: Bitmap::exactly(0) };
        let register = RegisterModifier { register: CpuidRegister::Eax, bitmap: Bitmap::exactly(0) };
        let most = CpuConfig { msr_modifiers: vec![msr; MAX_TEMPLATE_ENTRIES], ..CpuConfig::default() };
        assert_eq!(most.check(), Ok(()));
        let more = MAX_TEMPLATE_ENTRIES + 1;
        for (template, named) in [
            (CpuConfig { msr_modifiers: vec![msr; more], ..CpuConfig::default() }, "msr_modifiers has 1025"),
            (
                CpuConfig { cpuid_modifiers: vec![leaf(0, vec![]); more], ..CpuConfig::default() },
                "cpuid_modifiers has 1025",
            ),
            (
                CpuConfig { cpuid_modifiers: vec![leaf(0, vec![register; more])], ..CpuConfig::default() },
                "modifiers has 1025 entries; at most 1024",
            ),
            (
                CpuConfig { kvm_capabilities: vec![KvmCapability::Ignore(1); more], ..CpuConfig::default() },
                "kvm_capabilities has 1025",
            ),
            (
                CpuConfig { cpuid_modifiers: vec![leaf(8, vec![])], ..CpuConfig::default() },
                "flags is 8; it must be between 0 and 7",
            ),
        ] {
            let error = template.check().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn section_is_a_path_or_a_template() {
        let source = |json: &str| serde_json::from_str::<CpuConfigSource>(json).map_err(|e| e.to_string());
        assert_eq!(source("\"t.json\""), Ok(CpuConfigSource::File("t.json".into())));
        assert_eq!(source("{}"), Ok(CpuConfigSource::Inline(CpuConfig::default())));
        assert!(source("7").unwrap_err().contains("the path of a CPU template or the template"));
        assert!(source(r#"{"cpuid":[]}"#).unwrap_err().contains("`cpuid`"));
        assert!(CpuConfigSource::File("".into()).check().is_err());
    }

    proptest! {
        #[test]
        fn written_template_is_read_back(template in crate::testing::cpu_config()) {
            let json = serde_json::to_string(&template).unwrap();
            prop_assert_eq!(parse(&json), Ok(template.clone()));
            prop_assert_eq!(template.check(), Ok(()));
        }
    }
}
