//! Virtio devices: which a machine has, where in the guest they lie, and what KVM does for them.
//!
//! # How the guest finds them
//!
//! Device `n` has the `n`-th window of 4 KiB from [`layout::VIRTIO_MMIO`] on and the `n`-th interrupt line from 5 on. A guest with ACPI
//! finds it in the DSDT, one without in `virtio_mmio.device=` on its command line. Root device first, other drives in the order
//! in which they were given, then entropy: that order names them (`vda`, `vdb`, ...).
//!
//! # Invariants
//!
//! - Places are given out before the guest's tables are written, and devices are made after its vCPUs (the order of KVM's calls,
//!   [`crate::kvm`]).
//! - A kick goes ioeventfd -> io worker and an interrupt irqfd -> guest. A vCPU thread touches registers only.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use config::{Drive, Entropy, TokenBucket};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use virtio::block::disk::Disk;
use virtio::block::{Block, BlockConfig, BlockControl, BlockError};
use virtio::device::Device;
use virtio::entropy::{self, EntropyControl};
use virtio::eventfd::EventFd as VirtioEventFd;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::transport::mmio::{IRQ_LINES, IrqLine, MAX_DEVICES, MmioTransport, WINDOW_SIZE};
use virtio::transport::{Attachment, IoEvents, KickMatch};
use virtio::worker::{Workers, WorkersConfig, monotonic};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Bus, BusDevice};
use crate::kvm::{KvmError, Vm};
use crate::layout;

/// The devices that a machine is to have, their back ends open.
#[derive(Debug, Default)]
pub struct DeviceSetup {
    /// Drives, checked to go together, each with its disk.
    pub drives: Vec<(Drive, Disk)>,
    /// The entropy device.
    pub entropy: Option<Entropy>,
}

/// Why devices cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There are not enough interrupt lines.
    #[error("{count} devices are too many: there are interrupt lines for {MAX_DEVICES}")]
    TooMany {
        /// How many were asked for.
        count: usize,
    },
    /// A disk cannot be served.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The host is out of threads or descriptors.
    #[error("cannot create {what}: {source}")]
    Host {
        /// What was to be made.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// KVM refused an interrupt line.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Where a device lies in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Guest-physical address of its window.
    pub(crate) addr: u64,
    /// Its interrupt line.
    pub(crate) irq: u32,
}

impl DeviceSetup {
    fn count(&self) -> usize {
        self.drives.len() + usize::from(self.entropy.is_some())
    }

    /// Gives each device its place.
    pub(crate) fn places(&self) -> Result<Vec<Place>, DeviceError> {
        let count = self.count();
        if count > MAX_DEVICES {
            return Err(DeviceError::TooMany { count });
        }
        let places = (0..count as u64).zip(IRQ_LINES);
        Ok(places.map(|(n, irq)| Place { addr: layout::VIRTIO_MMIO + n * WINDOW_SIZE, irq }).collect())
    }

    /// What goes on the kernel's command line: the root device, and where each device is.
    pub(crate) fn boot_args(&self, places: &[Place]) -> String {
        let mut args = vec!["pci=off".to_owned()];
        if let Some((root, _)) = self.drives.iter().find(|(drive, _)| drive.is_root_device) {
            let device = match &root.partuuid {
                Some(uuid) => format!("PARTUUID={uuid}"),
                None => "/dev/vda".to_owned(),
            };
            args.push(format!("root={device} {}", if root.is_read_only { "ro" } else { "rw" }));
        }
        let windows = places.iter().map(|p| format!("virtio_mmio.device=4K@{:#x}:{}", p.addr, p.irq));
        args.extend(windows);
        args.join(" ")
    }
}

/// The devices of a machine.
pub struct Devices {
    /// Who runs them; `None` where there are none, so that a machine without devices has no such thread.
    workers: Option<Workers>,
    drives: BTreeMap<String, BlockControl>,
    entropy: Option<EntropyControl>,
}

impl Devices {
    /// Makes the devices and puts them on the bus, each in its place.
    pub(crate) fn attach(
        setup: DeviceSetup,
        places: &[Place],
        vm: &Vm,
        bus: &mut Bus,
    ) -> Result<Self, DeviceError> {
        let mut devices = Devices { workers: None, drives: BTreeMap::new(), entropy: None };
        if setup.count() == 0 {
            return Ok(devices);
        }
        let workers =
            Workers::start(WorkersConfig { shared: setup.shared_workers(), ..WorkersConfig::default() })
                .map_err(|source| DeviceError::Host { what: "an I/O worker", source })?;
        let io_events: Arc<dyn IoEvents> = Arc::new(KvmIoEvents(vm.shared_fd()));
        let mut places = places.iter();
        let mut plug = |name: String, device: Box<dyn Device>| {
            let place = places.next().expect("each device was given a place");
            let attachment = Attachment { name, device, memory: vm.ram().clone(), workers: workers.clone() };
            attach_one(attachment, *place, vm, Arc::clone(&io_events), bus)
        };
        let now = monotonic();
        for (drive, disk) in root_first(setup.drives) {
            let limits = limits(drive.rate_limiter.as_ref());
            let (block, control) = Block::new(BlockConfig::of(&drive), disk, limits, Vec::new(), now)?;
            plug(format!("drive {}", drive.drive_id), Box::new(block))?;
            devices.drives.insert(drive.drive_id, control);
        }
        if let Some(config) = setup.entropy {
            let (device, control) = entropy::Entropy::new(limits(config.rate_limiter.as_ref()), now);
            plug("entropy".to_owned(), Box::new(device))?;
            devices.entropy = Some(control);
        }
        devices.workers = Some(workers);
        Ok(devices)
    }

    /// The workers, if there are devices to run.
    pub(crate) fn workers(&self) -> Option<&Workers> {
        self.workers.as_ref()
    }

    /// A drive, to be changed while it works.
    pub fn drive(&self, id: &str) -> Option<&BlockControl> {
        self.drives.get(id)
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices")
            .field("drives", &self.drives.keys().collect::<Vec<_>>())
            .field("entropy", &self.entropy.is_some())
            .finish_non_exhaustive()
    }
}

impl DeviceSetup {
    /// One worker for all, or as many as the drive that asks for most.
    fn shared_workers(&self) -> usize {
        self.drives.iter().map(|(drive, _)| usize::from(drive.io_threads())).max().unwrap_or(1)
    }
}

/// The root device is the guest's first disk.
fn root_first(mut drives: Vec<(Drive, Disk)>) -> Vec<(Drive, Disk)> {
    drives.sort_by_key(|(drive, _)| !drive.is_root_device);
    drives
}

fn attach_one(
    attachment: Attachment,
    place: Place,
    vm: &Vm,
    io_events: Arc<dyn IoEvents>,
    bus: &mut Bus,
) -> Result<(), DeviceError> {
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| DeviceError::Host { what: "an interrupt line", source })?;
    vm.register_irqfd(&event, place.irq)?;
    let transport = MmioTransport::new(attachment, place.addr, Box::new(Line(event)), io_events)
        .map_err(|source| DeviceError::Host { what: "a virtio device", source })?;
    bus.add(place.addr..place.addr + WINDOW_SIZE, Arc::new(Window(Mutex::new(transport))))
        .expect("the layout gives each device its own window");
    Ok(())
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

/// A device's window on the bus.
struct Window(Mutex<MmioTransport>);

impl Window {
    fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

/// An interrupt line, as a descriptor that KVM waits on.
struct Line(EventFd);

impl IrqLine for Line {
    fn trigger(&self) {
        // Its counter can only be full when the interrupt is raised anyway.
        let _ = self.0.write(1);
    }
}

/// KVM's ioeventfds.
struct KvmIoEvents(Arc<VmFd>);

impl KvmIoEvents {
    fn call(&self, addr: u64, matching: KickMatch, event: &VirtioEventFd, register: bool) -> io::Result<()> {
        let event = to_kvm(event)?;
        let addr = IoEventAddress::Mmio(addr);
        let result = match (matching, register) {
            (KickMatch::Any, true) => self.0.register_ioevent(&event, &addr, NoDatamatch),
            (KickMatch::Any, false) => self.0.unregister_ioevent(&event, &addr, NoDatamatch),
            (KickMatch::U32(value), true) => self.0.register_ioevent(&event, &addr, value),
            (KickMatch::U32(value), false) => self.0.unregister_ioevent(&event, &addr, value),
        };
        Ok(result?)
    }
}

impl IoEvents for KvmIoEvents {
    fn register(&self, addr: u64, matching: KickMatch, event: &VirtioEventFd) -> io::Result<()> {
        self.call(addr, matching, event, true)
    }

    fn unregister(&self, addr: u64, matching: KickMatch, event: &VirtioEventFd) {
        if let Err(error) = self.call(addr, matching, event, false) {
            log::error!("cannot unregister the ioeventfd at {addr:#x}: {error}");
        }
    }
}

/// Another descriptor of the same counter, of the type that `kvm-ioctls` takes.
fn to_kvm(event: &VirtioEventFd) -> io::Result<EventFd> {
    let fd = event.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor is an eventfd, open, and from here on owned by nobody else.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        };
        let disk = Disk::open(&virtio::block::disk::DiskOptions::of(&drive)).unwrap();
        (drive, disk)
    }

    #[test]
    fn devices_lie_side_by_side_and_the_guest_is_told() {
        let setup = DeviceSetup {
            drives: vec![drive("data", false, None), drive("rootfs", true, None)],
            entropy: Some(Entropy::default()),
        };
        let places = setup.places().unwrap();
        assert_eq!(places.len(), 3);
        assert_eq!(
            setup.boot_args(&places),
            "pci=off root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5 \
             virtio_mmio.device=4K@0xc0002000:6 virtio_mmio.device=4K@0xc0003000:7"
        );
        let order: Vec<_> = root_first(setup.drives).into_iter().map(|(d, _)| d.drive_id).collect();
        assert_eq!(order, ["rootfs", "data"]);
    }

    #[test]
    fn a_root_partition_is_named_by_its_uuid() {
        let setup = DeviceSetup { drives: vec![drive("r", true, Some("0eaa91a0-01"))], entropy: None };
        assert!(setup.boot_args(&[]).contains("root=PARTUUID=0eaa91a0-01 rw"));
    }

    #[test]
    fn more_devices_than_interrupt_lines_are_refused() {
        let drives = (0..=MAX_DEVICES).map(|i| drive(&format!("d{i}"), false, None)).collect();
        let setup = DeviceSetup { drives, entropy: None };
        assert!(matches!(setup.places(), Err(DeviceError::TooMany { count }) if count == MAX_DEVICES + 1));
    }
}
