//! userfaultfd: page faults of a span that another process answers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::ioctl::opcode;

use crate::sys::span::Span;

const UFFDIO: u8 = 0xaa;
const UFFD_API: u64 = 0xaa;
/// Discarded pages are reported as events.
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Faults of hugetlb pages are reported as well.
const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

const USERFAULTFD_IOC_NEW: libc::Ioctl = opcode::none(UFFDIO, 0x00) as libc::Ioctl;
const UFFDIO_API: libc::Ioctl = opcode::read_write::<Api>(UFFDIO, 0x3f) as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = opcode::read_write::<Register>(UFFDIO, 0x00) as libc::Ioctl;
const UFFDIO_WAKE: libc::Ioctl = opcode::read::<Extent>(UFFDIO, 0x02) as libc::Ioctl;
const UFFDIO_UNREGISTER: libc::Ioctl = opcode::read::<Extent>(UFFDIO, 0x01) as libc::Ioctl;

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Extent {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Extent,
    mode: u64,
    ioctls: u64,
}

/// A userfaultfd. While a descriptor of it is open, a fault in a registered span waits for its
/// answer. When the last one is closed, waiting threads continue and *read zeros*. So the sender of
/// a descriptor must keep this one.
#[derive(Debug)]
pub(crate) struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Opens a userfaultfd that reports missing pages and removals, including faults in the kernel,
    /// which KVM's are.
    pub(crate) fn open(hugetlb: bool) -> io::Result<Self> {
        let fd = new_fd()?;
        let features = UFFD_FEATURE_EVENT_REMOVE | if hugetlb { UFFD_FEATURE_MISSING_HUGETLBFS } else { 0 };
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the structure is the one that the call takes.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        check(done)?;
        Ok(Userfault { fd })
    }

    /// Registers `span`: its missing pages are reported as faults.
    pub(crate) fn register(&self, span: Span) -> io::Result<()> {
        let range = Extent { start: span.addr(), len: span.len() };
        let mut register = Register { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the structure is the one that the call takes. The span is guest memory, where any
        // access may block.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        check(done)
    }

    /// Makes threads that wait for a page of `span` fault again (`UFFDIO_WAKE`). A fault that was
    /// read and never answered can then be read again.
    pub(crate) fn fault_again(&self, span: Span) -> io::Result<()> {
        let mut range = Extent { start: span.addr(), len: span.len() };
        // SAFETY: the structure is the one that the call takes.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut range) };
        check(done)
    }

    /// Unregisters `span`: waiting threads continue, and missing pages are zero from now on.
    pub(crate) fn unregister(&self, span: Span) -> io::Result<()> {
        let mut range = Extent { start: span.addr(), len: span.len() };
        // SAFETY: the structure is the one that the call takes.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) };
        check(done)
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Creates a userfaultfd: from `/dev/userfaultfd` if its permissions allow, else by the system
/// call, which needs privileges.
fn new_fd() -> io::Result<OwnedFd> {
    const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = std::fs::File::open("/dev/userfaultfd") {
        // SAFETY: the call takes flags by value.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) };
        if fd >= 0 {
            // SAFETY: the kernel has just created the descriptor for this process; nothing else
            // owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    let flags = rustix::mm::UserfaultfdFlags::CLOEXEC | rustix::mm::UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor has no effect until a span is registered.
    Ok(unsafe { rustix::mm::userfaultfd(flags) }?)
}

fn check(done: libc::c_int) -> io::Result<()> {
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
