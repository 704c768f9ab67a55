//! Virtio devices: which a machine has, where in the guest they lie, and what KVM does for them.
//!
//! # How the guest finds them
//!
//! Devices are numbered: the root device, the other drives in the order in which they were given, then network interfaces
//! in theirs, then entropy, then vsock. That order names them (`vda`, `vdb`, ...; `eth0`, `eth1`, ...).
//!
//! - On virtio-mmio device `n` has the `n`-th window of 4 KiB from [`layout::VIRTIO_MMIO`](crate::layout::VIRTIO_MMIO) on and the `n`-th
//!   interrupt line from 5 on. A guest with ACPI finds it in the DSDT, one without in `virtio_mmio.device=` on its command line.
//! - On virtio-pci device `n` is in slot `n + 1` of bus 0. A guest with ACPI finds the bus in the DSDT and the MCFG, one without by
//!   probing.
//!
//! # Invariants
//!
//! - Places are given out before the guest's tables are written, and devices are made after its vCPUs (the order of KVM's calls,
//!   [`crate::kvm`]).
//! - A kick goes ioeventfd -> io worker, and an interrupt from the worker to KVM. A vCPU thread touches registers only.
//!
//! | module | what it is about |
//! |---|---|
//! | `place` | who lies where |
//! | `board` | putting a device in its place, on either transport |
//! | `mmio`, `pci` | what either transport needs of the bus and of KVM |
//! | `io_events` | kicks |
//! | `metadata` | network interfaces' way to the metadata service |

mod board;
mod io_events;
mod metadata;
mod mmio;
mod pci;
mod place;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use block::disk::Disk;
use block::{Block, BlockConfig, BlockControl, BlockError, BlockState};
use config::{Drive, Entropy, NetworkInterface, TokenBucket};
use entropy::{EntropyControl, EntropyState};
use net::{Net, NetBackend, NetConfig, NetControl, NetError, NetSetup, NetState};
use virtio::device::{DecodeError, DeviceData};
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::transport::RestoreError;
use virtio::worker::{WorkerId, Workers, WorkersConfig, monotonic};
use vsock::{HostSockets, Vsock, VsockControl, VsockState};

use crate::kvm::{KvmError, Vm};
use crate::vcpu::Buses;

use board::Board;
pub use board::{DevicesState, SavedDevice, SavedTransport};
use io_events::KvmIoEventFds;
pub(crate) use place::{Places, Window};

/// How long new workers may take to say that they are there.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// The devices that a machine is to have, their back ends open.
#[derive(Debug, Default)]
pub struct DeviceSetup {
    /// Drives, checked to go together, each with its disk.
    pub drives: Vec<(Drive, Disk)>,
    /// Network interfaces, checked to go together, each with its network.
    pub networks: Vec<(NetworkInterface, NetBackend)>,
    /// The entropy device.
    pub entropy: Option<Entropy>,
    /// The socket device.
    pub vsock: Option<VsockSetup>,
    /// The metadata service, which some of the network interfaces lead to.
    pub metadata: Option<Arc<mmds::Service>>,
    /// All devices are on virtio-pci instead of virtio-mmio.
    pub pci: bool,
}

/// A socket device to be.
#[derive(Debug)]
pub struct VsockSetup {
    /// The guest's context id.
    pub guest_cid: u32,
    /// Its sockets on the host.
    pub sockets: HostSockets,
}

/// Why devices cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There are not enough places.
    #[error("{count} devices are too many: there are {max} {what}")]
    TooMany {
        /// How many were asked for.
        count: usize,
        /// How many there can be.
        max: usize,
        /// Of what there are no more.
        what: &'static str,
    },
    /// A saved machine had other devices.
    #[error("the machine has the devices [{here}], but was saved with [{there}]")]
    OtherDevices {
        /// Names of the devices that it has.
        here: String,
        /// Names of the devices that it had.
        there: String,
    },
    /// A saved machine had its devices elsewhere.
    #[error("the devices were saved on virtio-{}, and this process puts them on virtio-{} (--enable-pci)", if *pci { "mmio" } else { "pci" }, if *pci { "pci" } else { "mmio" })]
    OtherTransport {
        /// This process puts them on PCI.
        pci: bool,
    },
    /// The saved state of a device is that of another kind of device, or damaged.
    #[error("{name}: {source}")]
    State {
        /// The device.
        name: String,
        /// What is wrong with the state.
        source: DecodeError,
    },
    /// A saved device is of a kind that this version does not have.
    #[error("{name}: the saved state is that of a {kind} device, which this version does not have")]
    UnknownKind {
        /// The device.
        name: String,
        /// The kind of device that was saved.
        kind: String,
    },
    /// A saved device cannot be made again.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A disk cannot be served.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A network interface cannot be served.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The kernel writes to guest memory behind the back of who counts.
    #[error(
        "network interface {id} has the back end vhost, whose writes cannot be tracked: it cannot be had with track_dirty_pages"
    )]
    VhostTracked {
        /// Which interface.
        id: String,
    },
    /// The host is out of threads or descriptors.
    #[error("cannot create {what}: {source}")]
    Host {
        /// What was to be made.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl DeviceSetup {
    fn count(&self) -> usize {
        self.drives.len()
            + self.networks.len()
            + usize::from(self.entropy.is_some())
            + usize::from(self.vsock.is_some())
    }

    /// Gives each device its place.
    pub(crate) fn places(&self) -> Result<Places, DeviceError> {
        Places::new(self.count(), self.pci)
    }

    /// What goes on the kernel's command line: the root device, and where each device is.
    pub(crate) fn boot_args(&self, places: &Places) -> String {
        let root = self.drives.iter().find(|(drive, _)| drive.is_root_device).map(|(root, _)| {
            let mode = if root.is_read_only { "ro" } else { "rw" };
            match &root.partuuid {
                Some(uuid) => format!("root=PARTUUID={uuid} {mode}"),
                None => format!("root=/dev/vda {mode}"),
            }
        });
        let args: Vec<_> = root.into_iter().chain(places.boot_args()).collect();
        args.join(" ")
    }
}

/// The devices of a machine.
pub struct Devices {
    /// Who runs them; `None` where there are none, so that a machine without devices has no such thread.
    workers: Option<Workers>,
    /// Where they are; `None` where there are none.
    board: Option<Board>,
    drives: BTreeMap<String, BlockControl>,
    networks: BTreeMap<String, NetControl>,
    entropy: Option<EntropyControl>,
    vsock: Option<VsockControl>,
}

impl Devices {
    /// Makes the devices and puts them on the buses, each in its place. With a saved state, they are what it says, and their workers are
    /// paused.
    pub(crate) fn attach(
        setup: DeviceSetup,
        places: Places,
        saved: Option<&DevicesState>,
        vm: &Vm,
        buses: &mut Buses,
    ) -> Result<Self, DeviceError> {
        let mut devices = Devices {
            workers: None,
            board: None,
            drives: BTreeMap::new(),
            networks: BTreeMap::new(),
            entropy: None,
            vsock: None,
        };
        if setup.count() == 0 {
            // The bus is there all the same.
            if setup.pci {
                pci::root(buses, Arc::new(KvmIoEventFds(vm.shared_fd())));
            }
            return Ok(devices);
        }
        let workers =
            Workers::start(WorkersConfig { shared: setup.shared_workers(), ..WorkersConfig::default() })
                .map_err(|source| DeviceError::Host { what: "an I/O worker", source })?;
        let drives = root_first(setup.drives);
        let own = own_workers(&drives, saved, &workers)?;
        if saved.is_some() {
            // They have nothing to do; what they may have to wait for is a processor.
            workers.pause(START_PATIENCE).map_err(|busy| DeviceError::Host {
                what: "an I/O worker",
                source: io::Error::other(busy),
            })?;
        }
        let mut board = Board::new(places, vm, buses, workers.clone());
        let now = monotonic();
        for ((drive, disk), own) in drives.into_iter().zip(own) {
            let name = format!("drive {}", drive.drive_id);
            let (block, control) = match saved_state::<BlockState>(saved, &name)? {
                Some(state) => Block::restore(&state, disk, own, now)?,
                None => {
                    let limits = limits(drive.rate_limiter.as_ref());
                    Block::new(BlockConfig::of(&drive), disk, limits, own, now)?
                }
            };
            board.plug(name, Box::new(block), vm, buses)?;
            devices.drives.insert(drive.drive_id, control);
        }
        for (network, backend) in setup.networks {
            let interceptor = metadata::interceptor(setup.metadata.as_ref(), &network, now);
            if backend.is_vhost() && vm.ram().tracks_dirty_pages() {
                return Err(DeviceError::VhostTracked { id: network.iface_id });
            }
            let name = format!("net {}", network.iface_id);
            let setup = NetSetup { backend, interceptor };
            let (net, control) = match saved_state::<NetState>(saved, &name)? {
                Some(state) => Net::restore(&state, network.guest_mac.map(|mac| mac.0), setup, now)?,
                None => {
                    let rx = limits(network.rx_rate_limiter.as_ref());
                    let tx = limits(network.tx_rate_limiter.as_ref());
                    Net::new(NetConfig::of(&network), setup, rx, tx, now)?
                }
            };
            board.plug(name, Box::new(net), vm, buses)?;
            devices.networks.insert(network.iface_id, control);
        }
        if let Some(config) = setup.entropy {
            let name = "entropy".to_owned();
            let (device, control) = match saved_state::<EntropyState>(saved, &name)? {
                Some(state) => entropy::Entropy::restore(&state, now),
                None => entropy::Entropy::new(limits(config.rate_limiter.as_ref()), now),
            };
            board.plug(name, Box::new(device), vm, buses)?;
            devices.entropy = Some(control);
        }
        if let Some(VsockSetup { guest_cid, sockets }) = setup.vsock {
            let name = "vsock".to_owned();
            let (device, control) = match saved_state::<VsockState>(saved, &name)? {
                Some(state) => Vsock::restore(&state, Some(guest_cid), sockets),
                None => Vsock::new(guest_cid, sockets),
            };
            board.plug(name, Box::new(device), vm, buses)?;
            devices.vsock = Some(control);
        }
        if let Some(saved) = saved {
            board.restore(saved)?;
        }
        devices.workers = Some(workers);
        devices.board = Some(board);
        Ok(devices)
    }

    /// Their state. The vCPUs stand still and the workers are paused.
    pub(crate) fn save(&self) -> DevicesState {
        let nothing = || DevicesState { pci: None, devices: Vec::new() };
        self.board.as_ref().map_or_else(nothing, Board::save)
    }

    /// The workers, if there are devices to run.
    pub(crate) fn workers(&self) -> Option<&Workers> {
        self.workers.as_ref()
    }

    /// Lets nothing new be taken from the guest's queues, for good, and waits at most `patience` until nothing is in flight.
    pub fn still(&self, patience: Duration) -> Result<(), virtio::worker::PauseError> {
        self.workers.as_ref().map_or(Ok(()), |workers| workers.pause(patience))
    }

    /// A drive, to be changed while it works.
    pub fn drive(&self, id: &str) -> Option<&BlockControl> {
        self.drives.get(id)
    }

    /// The socket device.
    pub fn vsock(&self) -> Option<&VsockControl> {
        self.vsock.as_ref()
    }

    /// A network interface, to be changed while it works.
    pub fn network(&self, id: &str) -> Option<&NetControl> {
        self.networks.get(id)
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices")
            .field("drives", &self.drives.keys().collect::<Vec<_>>())
            .field("networks", &self.networks.keys().collect::<Vec<_>>())
            .field("entropy", &self.entropy.is_some())
            .field("vsock", &self.vsock.is_some())
            .finish_non_exhaustive()
    }
}

impl DeviceSetup {
    /// One worker for all that have none of their own, or as many as the device among them that asks for most.
    fn shared_workers(&self) -> usize {
        let shared = self.drives.iter().filter(|(_, disk)| !disk.wants_own_workers());
        let drives = shared.map(|(drive, _)| drive.io_threads());
        let networks = self.networks.iter().map(|(network, _)| network.io_threads());
        drives.chain(networks).max().unwrap_or(1).into()
    }
}

/// The saved state of the device `name`, if there is a saved machine that has it.
fn saved_state<D: DeviceData>(saved: Option<&DevicesState>, name: &str) -> Result<Option<D>, DeviceError> {
    let Some(state) = saved.and_then(|saved| saved.device(name)) else { return Ok(None) };
    let decoded = state.decode();
    decoded.map(Some).map_err(|source| DeviceError::State { name: name.to_owned(), source })
}

impl DevicesState {
    /// Whether the state of each device can be decoded.
    pub fn check(&self) -> Result<(), DeviceError> {
        for saved in &self.devices {
            let state = saved.device();
            let decoded = match state.name() {
                BlockState::NAME => state.decode::<BlockState>().map(drop),
                NetState::NAME => state.decode::<NetState>().map(drop),
                EntropyState::NAME => state.decode::<EntropyState>().map(drop),
                VsockState::NAME => state.decode::<VsockState>().map(drop),
                kind => {
                    return Err(DeviceError::UnknownKind { name: saved.name.clone(), kind: kind.to_owned() });
                }
            };
            decoded.map_err(|source| DeviceError::State { name: saved.name.clone(), source })?;
        }
        Ok(())
    }
}

/// For each drive the workers that serve it and nothing else, if it is the better for them: one for each of its I/O threads.
fn own_workers(
    drives: &[(Drive, Disk)],
    saved: Option<&DevicesState>,
    workers: &Workers,
) -> Result<Vec<Vec<WorkerId>>, DeviceError> {
    let threads = |drive: &Drive| -> Result<u16, DeviceError> {
        match saved_state::<BlockState>(saved, &format!("drive {}", drive.drive_id))? {
            Some(state) => Ok(state.config.check().map(|()| state.config.io_threads)?),
            None => Ok(drive.io_threads()),
        }
    };
    let own = |(drive, disk): &(Drive, Disk)| {
        let count = if disk.wants_own_workers() { threads(drive)? } else { 0 };
        let made = (0..count).map(|_| workers.dedicated()).collect::<io::Result<_>>();
        made.map_err(|source| DeviceError::Host { what: "an I/O worker", source })
    };
    drives.iter().map(own).collect()
}

/// The root device is the guest's first disk.
fn root_first(mut drives: Vec<(Drive, Disk)>) -> Vec<(Drive, Disk)> {
    drives.sort_by_key(|(drive, _)| !drive.is_root_device);
    drives
}

/// Limits as the API has them, as the devices take them.
pub fn limits(limiter: Option<&config::RateLimiter>) -> RateLimiterConfig {
    let bucket = |bucket: TokenBucket| BucketConfig {
        size: bucket.size,
        refill_time_ms: bucket.refill_time,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
    };
    limiter.map_or_else(RateLimiterConfig::default, |limiter| RateLimiterConfig {
        bandwidth: limiter.bandwidth.map(bucket),
        ops: limiter.ops.map(bucket),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio::transport::{mmio as mmio_transport, pci as pci_transport};

    fn drive(id: &str, root: bool, partuuid: Option<&str>) -> (Drive, Disk) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let drive = Drive {
            drive_id: id.to_owned(),
            is_root_device: root,
            partuuid: partuuid.map(str::to_owned),
            cache_type: config::CacheType::Unsafe,
            is_read_only: false,
            path_on_host: Some(file.path().to_owned()),
            rate_limiter: None,
            io_engine: None,
            socket: None,
            num_queues: None,
            io_threads: None,
            queue_size: None,
            overlay: None,
            lock: None,
        };
        let disk = Disk::open(&block::disk::DiskOptions::of(&drive)).unwrap();
        (drive, disk)
    }

    #[test]
    fn devices_lie_side_by_side_and_the_guest_is_told() {
        let setup = DeviceSetup {
            drives: vec![drive("data", false, None), drive("rootfs", true, None)],
            networks: vec![],
            entropy: Some(Entropy::default()),
            vsock: None,
            metadata: None,
            pci: false,
        };
        assert_eq!(
            setup.boot_args(&setup.places().unwrap()),
            "root=/dev/vda rw pci=off virtio_mmio.device=4K@0xc0001000:5 \
             virtio_mmio.device=4K@0xc0002000:6 virtio_mmio.device=4K@0xc0003000:7"
        );
        let order: Vec<_> = root_first(setup.drives).into_iter().map(|(d, _)| d.drive_id).collect();
        assert_eq!(order, ["rootfs", "data"]);
    }

    #[test]
    fn a_root_partition_is_named_by_its_uuid() {
        let drives = vec![drive("r", true, Some("0eaa91a0-01"))];
        let setup = DeviceSetup { drives, pci: true, ..DeviceSetup::default() };
        assert_eq!(setup.boot_args(&setup.places().unwrap()), "root=PARTUUID=0eaa91a0-01 rw");
    }

    #[test]
    fn more_devices_than_places_are_refused() {
        for (pci, max) in [(false, mmio_transport::MAX_DEVICES), (true, pci_transport::MAX_DEVICES)] {
            let drives = (0..max).map(|i| drive(&format!("d{i}"), false, None)).collect();
            let mut setup = DeviceSetup { drives, pci, ..DeviceSetup::default() };
            setup.places().unwrap();
            setup.entropy = Some(Entropy::default());
            let error = setup.places().unwrap_err();
            assert!(
                matches!(error, DeviceError::TooMany { count, max: m, .. } if count == max + 1 && m == max)
            );
        }
    }
}
