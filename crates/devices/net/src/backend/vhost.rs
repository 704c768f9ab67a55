//! The kernel's vhost-net: a kernel thread that moves frames between a tap and a queue pair.
//!
//! One instance serves one queue pair. It belongs to the process that claims it ([`Vhost::claim`])
//! for its device, which may be a child of the process that opened it. The monitor passes it the
//! memory table, the addresses of the vrings, and the eventfds for kicks and interrupts. From then
//! on the kernel thread does the work.
//!
//! # Where unsafe is
//!
//! This is a leaf module: the ioctls take pointers to small structs. The addresses in them are
//! those of guest memory, which the kernel reads and writes as the guest's descriptors say. The
//! kernel checks each address against the memory table.
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

/// Most memory regions that the kernel accepts by default (`max_mem_regions`).
const MAX_REGIONS: usize = 64;

/// Why the kernel's vhost-net cannot serve an interface.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The device file cannot be opened.
    #[error("cannot open {PATH}: {0}; load the module vhost_net, or give this user access to it")]
    Open(#[source] io::Error),
    /// The kernel refused a step of the set-up.
    #[error("vhost-net: cannot {step}: {source}")]
    Setup {
        /// The step that failed.
        step: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// An instance of vhost-net.
#[derive(Debug)]
pub struct Vhost {
    file: File,
    features: u64,
    claimed: AtomicBool,
}

/// `struct vhost_vring_state`
#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

/// `struct vhost_vring_file`
#[repr(C)]
struct VringFile {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`
#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

/// `struct vhost_memory_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest_addr: u64,
    size: u64,
    host_addr: u64,
    flags_padding: u64,
}

/// `struct vhost_memory`, with its flexible array at full length.
#[repr(C)]
struct MemoryTable {
    nregions: u32,
    padding: u32,
    regions: [MemoryRegion; MAX_REGIONS],
}

/// Number of an ioctl of vhost, as `_IO`, `_IOR`, `_IOW` and `_IOWR` compute it: direction, size of
/// the argument, type 0xaf, number.
const fn ioctl_number(direction: u32, number: u32, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u32) << 16 | 0xaf << 8 | number) as libc::Ioctl
}

const WRITE: u32 = 1;
const READ: u32 = 2;
const GET_FEATURES: libc::Ioctl = ioctl_number(READ, 0x00, 8);
const SET_FEATURES: libc::Ioctl = ioctl_number(WRITE, 0x00, 8);
const SET_OWNER: libc::Ioctl = ioctl_number(0, 0x01, 0);
const SET_MEM_TABLE: libc::Ioctl = ioctl_number(WRITE, 0x03, 8);
const SET_VRING_NUM: libc::Ioctl = ioctl_number(WRITE, 0x10, size_of::<VringState>());
const SET_VRING_ADDR: libc::Ioctl = ioctl_number(WRITE, 0x11, size_of::<VringAddr>());
const SET_VRING_BASE: libc::Ioctl = ioctl_number(WRITE, 0x12, size_of::<VringState>());
const GET_VRING_BASE: libc::Ioctl = ioctl_number(READ | WRITE, 0x12, size_of::<VringState>());
const SET_VRING_KICK: libc::Ioctl = ioctl_number(WRITE, 0x20, size_of::<VringFile>());
const SET_VRING_CALL: libc::Ioctl = ioctl_number(WRITE, 0x21, size_of::<VringFile>());
const SET_VRING_ERR: libc::Ioctl = ioctl_number(WRITE, 0x22, size_of::<VringFile>());
const NET_SET_BACKEND: libc::Ioctl = ioctl_number(WRITE, 0x30, size_of::<VringFile>());

/// What a vring is started with.
pub(crate) struct VringConfig<'a> {
    /// 0 receives, 1 transmits.
    pub(crate) index: u32,
    pub(crate) state: QueueState,
    pub(crate) kick: &'a EventFd,
    pub(crate) call: &'a EventFd,
    pub(crate) error: &'a EventFd,
}

impl Vhost {
    /// Opens a new instance. It has no owner until [`Vhost::claim`].
    pub(crate) fn open() -> Result<Self, VhostError> {
        let file = File::options().read(true).write(true).open(PATH).map_err(VhostError::Open)?;
        let mut vhost = Vhost { file, features: 0, claimed: AtomicBool::new(false) };
        let mut features = 0u64;
        vhost.ioctl_with("get features", GET_FEATURES, &mut features)?;
        vhost.features = features;
        Ok(vhost)
    }

    /// Makes this process the owner (`VHOST_SET_OWNER`): host addresses are this process's from now
    /// on. A second call does nothing.
    pub(crate) fn claim(&self) -> Result<(), VhostError> {
        if self.claimed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.ioctl("set the owner", SET_OWNER).inspect_err(|_| self.claimed.store(false, Ordering::Release))
    }

    /// Its descriptor.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Features that this kernel's vhost-net supports.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// Sets the features that the driver accepted and the memory table.
    pub(crate) fn configure(&self, features: u64, ram: &GuestRam) -> Result<(), VhostError> {
        let mut features = kernel_features(features, self.features);
        self.ioctl_with("set features", SET_FEATURES, &mut features)?;
        let mut table = Box::new(MemoryTable {
            nregions: 0,
            padding: 0,
            regions: [MemoryRegion::default(); MAX_REGIONS],
        });
        let regions = ram.regions();
        if regions.len() > MAX_REGIONS {
            let source = Errno::TOOBIG.into();
            return Err(VhostError::Setup { step: "set a memory table of more than 64 regions", source });
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
        self.ioctl_with("set the memory table", SET_MEM_TABLE, &mut *table)
    }

    /// Sets up a vring and starts to serve it, with `tap_queue` as its backend.
    pub(crate) fn start_vring(
        &self,
        vring: &VringConfig<'_>,
        ram: &GuestRam,
        tap_queue: BorrowedFd<'_>,
    ) -> Result<(), VhostError> {
        let VringConfig { index, state, kick, call, error } = vring;
        let index = *index;
        let host = |addr| {
            ram.memory().get_host_address(GuestAddress(addr)).map(|at| at.expose_provenance() as u64).map_err(
                |_| VhostError::Setup {
                    step: "set a vring outside guest memory",
                    source: Errno::FAULT.into(),
                },
            )
        };
        let mut num = VringState { index, num: state.size.into() };
        self.ioctl_with("set the size of a vring", SET_VRING_NUM, &mut num)?;
        let mut base = VringState { index, num: state.next_avail.into() };
        self.ioctl_with("set the base of a vring", SET_VRING_BASE, &mut base)?;
        let (desc, used, avail) = (host(state.desc_table)?, host(state.used_ring)?, host(state.avail_ring)?);
        let mut addr = VringAddr { index, flags: 0, desc, used, avail, log: 0 };
        self.ioctl_with("set the addresses of a vring", SET_VRING_ADDR, &mut addr)?;
        for (step, number, event) in [
            ("set the kick of a vring", SET_VRING_KICK, kick),
            ("set the interrupt of a vring", SET_VRING_CALL, call),
            ("set the error event of a vring", SET_VRING_ERR, error),
        ] {
            let mut file = VringFile { index, fd: event.as_raw_fd() };
            self.ioctl_with(step, number, &mut file)?;
        }
        let mut backend = VringFile { index, fd: tap_queue.as_raw_fd() };
        self.ioctl_with("attach the tap", NET_SET_BACKEND, &mut backend)
    }

    /// Stops a vring and drains its in-flight requests. Returns its base, the next entry of the
    /// available ring.
    pub(crate) fn stop_vring(&self, index: u32) -> Result<u16, VhostError> {
        let mut backend = VringFile { index, fd: -1 };
        self.ioctl_with("detach the tap", NET_SET_BACKEND, &mut backend)?;
        let mut base = VringState { index, num: 0 };
        self.ioctl_with("get the base of a vring", GET_VRING_BASE, &mut base)?;
        Ok(base.num as u16)
    }

    /// An ioctl whose argument the kernel reads or writes.
    fn ioctl_with<T>(
        &self,
        step: &'static str,
        number: libc::Ioctl,
        argument: &mut T,
    ) -> Result<(), VhostError> {
        // SAFETY: every ioctl that is passed here takes a pointer to the `T` that it is passed
        // with, and any bits are a valid `T`. Addresses in it are of guest RAM, which stays mapped
        // while the process lives.
        let returned = unsafe { libc::ioctl(self.file.as_raw_fd(), number, std::ptr::from_mut(argument)) };
        check(step, returned)
    }

    /// An ioctl without an argument.
    fn ioctl(&self, step: &'static str, number: libc::Ioctl) -> Result<(), VhostError> {
        // SAFETY: the ioctl takes no argument.
        let returned = unsafe { libc::ioctl(self.file.as_raw_fd(), number, 0) };
        check(step, returned)
    }
}

/// The features to set for a driver that `accepted` some, in a kernel that supports `supported`.
///
/// `VERSION_1` is always among them: with it the kernel uses a header of 12 bytes, the size for
/// every driver here.
fn kernel_features(accepted: u64, supported: u64) -> u64 {
    (accepted | feature::VERSION_1) & supported & !LOG_ALL
}

/// `VHOST_F_LOG_ALL`, a feature of vhost and not of a device.
const LOG_ALL: u64 = 1 << 26;

fn check(step: &'static str, returned: libc::c_int) -> Result<(), VhostError> {
    if returned >= 0 {
        return Ok(());
    }
    Err(VhostError::Setup { step, source: io::Error::last_os_error() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_match_linux_vhost_h() {
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
    fn kernel_features_always_include_version_1() {
        let supported = feature::VERSION_1 | LOG_ALL | 1 << 15;
        assert_eq!(kernel_features(1 << 15 | 1 << 5, supported), feature::VERSION_1 | 1 << 15);
        assert_eq!(kernel_features(0, supported), feature::VERSION_1);
    }

    #[test]
    fn error_without_vhost_net_names_the_device_file() {
        if File::open(PATH).is_err() {
            assert!(Vhost::open().unwrap_err().to_string().contains(PATH));
        }
    }
}
