//! [`Saved`]: the contents of a state file, and the checks of a snapshot's two files.

use std::path::{Path, PathBuf};

use config::ConfigError;
use machine::MachineState;
use machine::devices::DeviceError;
use memory::MemoryLayout;
use memory::image::{ImageFile, ImageInfo, RestoreError, examine};
use memory::layout::MIB;
use snapshot::{Description, ReadError, Snapshot};

use super::config::{KIND, SavedConfig};

/// The state file of a microVM of this architecture, every section that this version knows decoded.
#[derive(Debug, Clone)]
pub struct Saved {
    /// The summary of the file.
    pub description: Description,
    /// The configuration of the microVM.
    pub config: SavedConfig,
    /// The description of its memory file.
    pub image: ImageInfo,
    /// The state of the machine.
    pub machine: MachineState,
}

/// A snapshot that passed all checks.
#[derive(Debug, Clone)]
pub struct Verified {
    /// The contents of the state file.
    pub saved: Saved,
    /// The memory file, if one was checked.
    pub memory: Option<ImageFile>,
}

/// Why a snapshot is not valid.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The state file cannot be read, is damaged, or holds something else.
    #[error(transparent)]
    State(#[from] ReadError),
    /// The memory file cannot be read.
    #[error(transparent)]
    Memory(#[from] RestoreError),
    /// The configuration in the state file is invalid.
    #[error("{}: section config: {source}", path.display())]
    Config {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// Two sections disagree.
    #[error("{}: {what}: section config says {configured}, section {section} has {found}", path.display())]
    Disagree {
        /// The state file.
        path: PathBuf,
        /// The number on which the sections disagree.
        what: &'static str,
        /// The configured number.
        configured: u64,
        /// The other section.
        section: &'static str,
        /// Its number.
        found: u64,
    },
    /// The state of a device cannot be decoded.
    #[error("{}: section machine: {source}", path.display())]
    Device {
        /// The state file.
        path: PathBuf,
        /// Which device, and what is wrong with its state.
        source: Box<DeviceError>,
    },
    /// The memory regions are not those of a guest of that size.
    #[error("{}: section memory: its regions are not those of a microVM with {mem_size_mib} MiB", path.display())]
    Layout {
        /// The state file.
        path: PathBuf,
        /// The configured size.
        mem_size_mib: u32,
    },
    /// The memory file is another guest's, or was truncated.
    #[error("the memory image {} has {found} bytes; the one of {} has {wanted}", path.display(), state.display())]
    MemorySize {
        /// The memory file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The state file.
        state: PathBuf,
        /// What the state file says.
        wanted: u64,
    },
}

impl Saved {
    /// Reads the state file at `path`.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        Self::of(&Snapshot::open(path)?)
    }

    /// Decodes a state file.
    pub fn of(snapshot: &Snapshot) -> Result<Self, ReadError> {
        snapshot.expect_kind(KIND)?;
        Ok(Saved {
            description: snapshot.describe(),
            config: snapshot.get()?,
            image: snapshot.get()?,
            machine: snapshot.get()?,
        })
    }
}

impl Saved {
    /// Reads the state file at `path` for a microVM to be restored, and checks that its sections
    /// agree.
    pub fn load(path: &Path) -> Result<Self, VerifyError> {
        let saved = Self::open(path)?;
        saved.check(path)?;
        Ok(saved)
    }

    /// Checks that the sections describe one microVM. The checksums do not say that: anyone can
    /// write a file whose checksums are right.
    fn check(&self, path: &Path) -> Result<(), VerifyError> {
        let path = || path.to_path_buf();
        let machine = &self.config.config.machine_config;
        machine.check().map_err(|source| VerifyError::Config { path: path(), source })?;
        let agree = |what, configured: u64, section, found: u64| {
            if configured == found {
                return Ok(());
            }
            Err(VerifyError::Disagree { path: path(), what, configured, section, found })
        };
        agree("vCPUs", u64::from(machine.vcpu_count), "machine", self.machine.vcpus.len() as u64)?;
        let mem_size_mib = machine.mem_size_mib;
        let layout = &self.image.layout;
        agree("bytes of memory", u64::from(mem_size_mib) * MIB, "memory", layout.ram_size())?;
        if *layout != MemoryLayout::of_size(mem_size_mib) {
            return Err(VerifyError::Layout { path: path(), mem_size_mib });
        }
        let devices = self.machine.devices.check();
        devices.map_err(|source| VerifyError::Device { path: path(), source: Box::new(source) })
    }
}

/// Checks the state file at `state`: all checksums, that every section decodes, and that they
/// agree. Checks that the memory file has the size that the state file says; it has no checksums.
pub fn verify(state: &Path, memory: Option<&Path>) -> Result<Verified, VerifyError> {
    let snapshot = Snapshot::open(state)?;
    // Also of sections that this version does not know.
    snapshot.verify()?;
    let saved = Saved::of(&snapshot)?;
    saved.check(state)?;
    let memory = memory.map(|memory| examine(memory, &saved.image)).transpose()?;
    if let Some(file) = &memory
        && file.size != saved.image.layout.file_size()
    {
        return Err(VerifyError::MemorySize {
            path: file.path.clone(),
            found: file.size,
            state: state.to_path_buf(),
            wanted: saved.image.layout.file_size(),
        });
    }
    Ok(Verified { saved, memory })
}

#[cfg(test)]
mod tests {
    use block::{BlockConfig, BlockState};
    use config::FullVmConfig;
    use entropy::EntropyState;
    use net::{NetConfig, NetState};
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};
    use snapshot::{Header, Section, Value, Writer};
    use virtio::device::{DeviceData, DeviceState};
    use virtio::rate_limiter::{BucketConfig, BucketState, RateLimiterState};
    use vsock::VsockState;

    use super::*;

    /// `saved`, written to a state file and read back.
    fn saved_and_read<S: Section>(saved: &S) -> S {
        let mut writer = Writer::new(&Header::new(KIND, "test", 0)).unwrap();
        writer.put(saved).unwrap();
        let file = Snapshot::parse(Path::new("test.state"), writer.finish().unwrap()).unwrap();
        file.get().unwrap()
    }

    /// The section of a default configuration, with one key replaced.
    fn with_key(key: &str, value: Value) -> Value {
        let saved = SavedConfig {
            config: FullVmConfig::default(),
            pci: false,
            id: "vm".into(),
            fresh_overlays: Vec::new(),
        };
        let mut section = Value::serialized(&saved).unwrap();
        let Value::Map(entries) = &mut section else { panic!("a section is a map") };
        entries.retain(|(name, _)| name.as_text() != Some(key));
        entries.push((key.into(), value));
        section
    }

    #[test]
    fn address_of_an_earlier_version_is_read() {
        let address = [169, 254, 7, 9].map(Value::from).to_vec();
        let mmds = Value::Map(vec![
            ("network_interfaces".into(), Value::Array(vec!["eth0".into()])),
            ("ipv4_address".into(), Value::Array(address)),
        ]);
        let saved: SavedConfig = snapshot::from_value(&with_key("mmds-config", mmds)).unwrap();
        assert_eq!(saved.config.mmds_config.unwrap().address().to_string(), "169.254.7.9");
    }

    #[test]
    fn template_that_is_refused_now_is_dropped() {
        let fields = [("vcpu_count", 1.into()), ("mem_size_mib", 1.into()), ("cpu_template", "V1N1".into())];
        let machine = Value::Map(fields.map(|(key, value): (&str, Value)| (key.into(), value)).to_vec());
        let saved: SavedConfig = snapshot::from_value(&with_key("machine-config", machine)).unwrap();
        assert_eq!(saved.config.machine_config.check(), Ok(()));
    }

    #[test]
    fn section_of_a_device_that_is_missing_here_is_refused() {
        let balloon = Value::Map(vec![("amount_mib".into(), 1.into())]);
        let error = snapshot::from_value::<SavedConfig>(&with_key("balloon", balloon)).unwrap_err();
        assert!(error.to_string().starts_with("section balloon: this version does not"), "{error}");
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Devices(Vec<DeviceState>);

    impl Section for Devices {
        const NAME: &'static str = "devices";
    }

    fn limiter() -> impl Strategy<Value = RateLimiterState> {
        let config = any::<[u64; 3]>().prop_map(|[size, refill_time_ms, one_time_burst]| BucketConfig {
            size,
            refill_time_ms,
            one_time_burst,
        });
        let bucket = || {
            prop::option::of((config.clone(), any::<[u64; 4]>()).prop_map(
                |(config, [burst, tokens, debt, fraction])| BucketState {
                    config,
                    burst,
                    tokens,
                    debt,
                    fraction,
                },
            ))
        };
        (bucket(), bucket()).prop_map(|(bandwidth, ops)| RateLimiterState { bandwidth, ops })
    }

    fn block() -> impl Strategy<Value = DeviceState> {
        let config =
            ("[!-~]{1,64}", any::<[u16; 3]>()).prop_map(|(id, [num_queues, queue_size, io_threads])| {
                BlockConfig { id, num_queues, queue_size, io_threads }
            });
        (config, any::<(u64, bool, bool, u32)>(), limiter()).prop_map(
            |(config, (capacity, read_only, flush, generation), limiter)| {
                DeviceState::of(&BlockState { config, capacity, read_only, flush, generation, limiter })
            },
        )
    }

    fn net() -> impl Strategy<Value = DeviceState> {
        let config = ("[!-~]{1,64}", any::<(Option<[u8; 6]>, Option<u16>, u16, u16)>())
            .prop_map(|(id, (mac, mtu, pairs, queue_size))| NetConfig { id, mac, mtu, pairs, queue_size });
        let rest = any::<(u64, u16, u64, bool, bool, u32, Vec<Option<[u8; 6]>>)>();
        (config, rest, limiter(), limiter()).prop_map(|(config, rest, rx_limiter, tx_limiter)| {
            let (features, active_pairs, offloads, link_up, can_announce, generation, former_macs) = rest;
            DeviceState::of(&NetState {
                config,
                features,
                active_pairs,
                offloads,
                link_up,
                can_announce,
                generation,
                former_macs,
                rx_limiter,
                tx_limiter,
            })
        })
    }

    fn device() -> impl Strategy<Value = DeviceState> {
        prop_oneof![
            block(),
            net(),
            limiter().prop_map(|limiter| DeviceState::of(&EntropyState { limiter })),
            any::<(u32, u32)>()
                .prop_map(|(guest_cid, next_port)| { DeviceState::of(&VsockState { guest_cid, next_port }) }),
        ]
    }

    fn decoded_and_encoded(state: &DeviceState) -> DeviceState {
        fn by<D: DeviceData>(state: &DeviceState) -> DeviceState {
            DeviceState::of(&state.decode::<D>().unwrap())
        }
        match state.name() {
            BlockState::NAME => by::<BlockState>(state),
            NetState::NAME => by::<NetState>(state),
            EntropyState::NAME => by::<EntropyState>(state),
            _ => by::<VsockState>(state),
        }
    }

    proptest! {
        #[test]
        fn every_device_state_survives_save_and_load(devices in prop::collection::vec(device(), 0..6)) {
            let devices = Devices(devices);
            let read = saved_and_read(&devices);
            prop_assert_eq!(&read, &devices);
            prop_assert_eq!(Devices(read.0.iter().map(decoded_and_encoded).collect()), devices);
        }

        #[test]
        fn every_configuration_survives_save_and_load(
            config in config::testing::vm_config(),
            pci: bool,
            id in "[a-zA-Z0-9-]{0,64}",
            fresh_overlays in prop::collection::vec("[a-z0-9_]{1,20}", 0..3),
        ) {
            let saved = SavedConfig { config: FullVmConfig::from(config), pci, id, fresh_overlays };
            prop_assert_eq!(saved_and_read(&saved), saved);
        }
    }
}
