//! The kernel's vhost-net: what moves frames between a tap and a pair of queues without a system call.
//!
//! One instance serves one pair. It belongs to the process that takes it ([`Vhost::take`]) for its device, which may be a child of the one that
//! opened it. It is told where guest memory is, where the rings are, and which descriptors mean a kick and an
//! interrupt; from then on a thread of the kernel's does the work.
//!
//! # Where unsafe is
//!
//! This is a leaf module: the requests take pointers to small structs, and the addresses in them are those of guest memory, which the
//! kernel then reads and writes as the guest's descriptors say. It checks each of them against the memory table.
#![expect(unsafe_code, reason = "ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use memory::GuestRam;
use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use sync::EventFd;
use virtio::device::feature;
use virtio::queue::QueueState;

const PATH: &str = "/dev/vhost-net";

/// Most regions that the kernel takes by default.
const MAX_REGIONS: usize = 64;

/// Why the kernel cannot serve an interface.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// There is no vhost-net.
    #[error("cannot open {PATH}: {0} (modprobe vhost_net, and the right to open it)")]
    Open(#[source] io::Error),
    /// The kernel refused a step of the set-up.
    #[error("vhost-net refuses {step}: {source}")]
    Setup {
        /// Which step.
        step: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// An instance of vhost-net.
#[derive(Debug)]
pub struct Vhost {
    file: File,
    features: u64,
    taken: AtomicBool,
}

#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

#[repr(C)]
struct VringFile {
    index: u32,
    fd: RawFd,
}

#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest_addr: u64,
    size: u64,
    host_addr: u64,
    flags_padding: u64,
}

#[repr(C)]
struct MemoryTable {
    nregions: u32,
    padding: u32,
    regions: [MemoryRegion; MAX_REGIONS],
}

/// The number of a request, as `_IO`, `_IOR` and `_IOW` make it: direction, size of the argument, type 0xaf, number.
const fn request(direction: u32, number: u32, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u32) << 16 | 0xaf << 8 | number) as libc::Ioctl
}

const WRITE: u32 = 1;
const READ: u32 = 2;
const GET_FEATURES: libc::Ioctl = request(READ, 0x00, 8);
const SET_FEATURES: libc::Ioctl = request(WRITE, 0x00, 8);
const SET_OWNER: libc::Ioctl = request(0, 0x01, 0);
const SET_MEM_TABLE: libc::Ioctl = request(WRITE, 0x03, 8);
const SET_VRING_NUM: libc::Ioctl = request(WRITE, 0x10, size_of::<VringState>());
const SET_VRING_ADDR: libc::Ioctl = request(WRITE, 0x11, size_of::<VringAddr>());
const SET_VRING_BASE: libc::Ioctl = request(WRITE, 0x12, size_of::<VringState>());
const GET_VRING_BASE: libc::Ioctl = request(READ | WRITE, 0x12, size_of::<VringState>());
const SET_VRING_KICK: libc::Ioctl = request(WRITE, 0x20, size_of::<VringFile>());
const SET_VRING_CALL: libc::Ioctl = request(WRITE, 0x21, size_of::<VringFile>());
const SET_VRING_ERR: libc::Ioctl = request(WRITE, 0x22, size_of::<VringFile>());
const NET_SET_BACKEND: libc::Ioctl = request(WRITE, 0x30, size_of::<VringFile>());

/// What a ring is served with.
pub(super) struct Ring<'a> {
    /// 0 receives, 1 transmits.
    pub(super) index: u32,
    pub(super) state: QueueState,
    pub(super) kick: &'a EventFd,
    pub(super) call: &'a EventFd,
    pub(super) error: &'a EventFd,
}

impl Vhost {
    /// A new instance, which belongs to nobody yet.
    pub(super) fn open() -> Result<Self, VhostError> {
        let file = File::options().read(true).write(true).open(PATH).map_err(VhostError::Open)?;
        let mut vhost = Vhost { file, features: 0, taken: AtomicBool::new(false) };
        let mut features = 0u64;
        vhost.call("to tell its features", GET_FEATURES, &mut features)?;
        vhost.features = features;
        Ok(vhost)
    }

    /// Makes it this process's: guest memory is this process's from now on.
    pub(super) fn take(&self) -> Result<(), VhostError> {
        if self.taken.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.number("to be owned", SET_OWNER).inspect_err(|_| self.taken.store(false, Ordering::Release))
    }

    /// Its descriptor.
    pub(super) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The features of rings and frames that this kernel's has.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Tells it what the driver accepted, and where guest memory is.
    pub(super) fn prepare(&self, features: u64, ram: &GuestRam) -> Result<(), VhostError> {
        let mut features = kernel_features(features, self.features);
        self.call("features", SET_FEATURES, &mut features)?;
        let mut table = Box::new(MemoryTable {
            nregions: 0,
            padding: 0,
            regions: [MemoryRegion::default(); MAX_REGIONS],
        });
        let regions = ram.regions();
        if regions.len() > MAX_REGIONS {
            let source = Errno::TOOBIG.into();
            return Err(VhostError::Setup { step: "that many regions of memory", source });
        }
        table.nregions = regions.len() as u32;
        for (to, from) in table.regions.iter_mut().zip(regions) {
            *to = MemoryRegion {
                guest_addr: from.guest_addr,
                size: from.size,
                host_addr: from.host_addr,
                flags_padding: 0,
            };
        }
        self.call("the memory table", SET_MEM_TABLE, &mut *table)
    }

    /// Sets a ring up and lets it be served, with the tap's queue `tap`.
    pub(super) fn start(
        &self,
        ring: &Ring<'_>,
        ram: &GuestRam,
        tap: BorrowedFd<'_>,
    ) -> Result<(), VhostError> {
        let Ring { index, state, kick, call, error } = ring;
        let index = *index;
        let host = |addr| {
            ram.memory().get_host_address(GuestAddress(addr)).map(|at| at.expose_provenance() as u64).map_err(
                |_| VhostError::Setup { step: "a ring outside guest memory", source: Errno::FAULT.into() },
            )
        };
        let mut vring = VringState { index, num: state.size.into() };
        self.call("the size of a ring", SET_VRING_NUM, &mut vring)?;
        let mut vring = VringState { index, num: state.next_avail.into() };
        self.call("the position of a ring", SET_VRING_BASE, &mut vring)?;
        let (desc, used, avail) = (host(state.desc_table)?, host(state.used_ring)?, host(state.avail_ring)?);
        let mut addr = VringAddr { index, flags: 0, desc, used, avail, log: 0 };
        self.call("the addresses of a ring", SET_VRING_ADDR, &mut addr)?;
        for (step, request, event) in [
            ("a kick descriptor", SET_VRING_KICK, kick),
            ("an interrupt descriptor", SET_VRING_CALL, call),
            ("an error descriptor", SET_VRING_ERR, error),
        ] {
            let mut file = VringFile { index, fd: event.as_raw_fd() };
            self.call(step, request, &mut file)?;
        }
        let mut backend = VringFile { index, fd: tap.as_raw_fd() };
        self.call("the tap", NET_SET_BACKEND, &mut backend)
    }

    /// Stops a ring, and waits for what is in flight. Returns the entry of the available ring that is next.
    pub(super) fn stop(&self, index: u32) -> Result<u16, VhostError> {
        let mut backend = VringFile { index, fd: -1 };
        self.call("to stop", NET_SET_BACKEND, &mut backend)?;
        let mut vring = VringState { index, num: 0 };
        self.call("to tell a ring's position", GET_VRING_BASE, &mut vring)?;
        Ok(vring.num as u16)
    }

    /// A request with an argument that the kernel reads, or writes, or both.
    fn call<T>(&self, step: &'static str, request: libc::Ioctl, argument: &mut T) -> Result<(), VhostError> {
        // SAFETY: every request that is passed here takes a pointer to the `T` that it is passed with, all of whose bits are plain
        // numbers. What addresses stand in it lie in guest RAM, which stays mapped while the process lives.
        let returned = unsafe { libc::ioctl(self.file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        done(step, returned)
    }

    /// A request without an argument.
    fn number(&self, step: &'static str, request: libc::Ioctl) -> Result<(), VhostError> {
        // SAFETY: the request takes no argument.
        let returned = unsafe { libc::ioctl(self.file.as_raw_fd(), request, 0) };
        done(step, returned)
    }
}

/// What the kernel is to do for a driver that accepted `accepted`, of what it `can`.
///
/// `VERSION_1` in any case: with it the kernel takes the header of a frame to be 12 bytes, as it is
/// for every driver here.
fn kernel_features(accepted: u64, can: u64) -> u64 {
    (accepted | feature::VERSION_1) & can & !LOG_ALL
}

/// `VHOST_F_LOG_ALL`, which is no feature of the device.
const LOG_ALL: u64 = 1 << 26;

fn done(step: &'static str, returned: libc::c_int) -> Result<(), VhostError> {
    if returned >= 0 {
        return Ok(());
    }
    Err(VhostError::Setup { step, source: io::Error::last_os_error() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernels_header() {
        // As <linux/vhost.h> computes them on x86_64.
        assert_eq!(GET_FEATURES as u32, 0x8008_af00);
        assert_eq!(SET_OWNER as u32, 0x0000_af01);
        assert_eq!(SET_MEM_TABLE as u32, 0x4008_af03);
        assert_eq!(SET_VRING_NUM as u32, 0x4008_af10);
        assert_eq!(SET_VRING_ADDR as u32, 0x4028_af11);
        assert_eq!(GET_VRING_BASE as u32, 0xc008_af12);
        assert_eq!(SET_VRING_KICK as u32, 0x4008_af20);
        assert_eq!(NET_SET_BACKEND as u32, 0x4008_af30);
        assert_eq!(size_of::<MemoryRegion>(), 32);
    }

    #[test]
    fn the_kernel_is_always_told_of_version_1() {
        let can = feature::VERSION_1 | LOG_ALL | 1 << 15;
        assert_eq!(kernel_features(1 << 15 | 1 << 5, can), feature::VERSION_1 | 1 << 15);
        assert_eq!(kernel_features(0, can), feature::VERSION_1);
    }

    #[test]
    fn without_vhost_net_the_error_names_the_device() {
        if File::open(PATH).is_err() {
            assert!(Vhost::open().unwrap_err().to_string().contains(PATH));
        }
    }
}
