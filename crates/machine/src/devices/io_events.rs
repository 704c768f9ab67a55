//! Kicks: KVM's ioeventfds.

use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use sync::EventFd as VirtioEventFd;
use virtio::transport::{IoEventFds, NotifyMatch};
use vmm_sys_util::eventfd::EventFd;

/// KVM's ioeventfds on memory-mapped addresses.
pub(super) struct KvmIoEventFds(pub(super) Arc<VmFd>);

impl KvmIoEventFds {
    fn call(
        &self,
        addr: u64,
        matching: NotifyMatch,
        event: &VirtioEventFd,
        register: bool,
    ) -> io::Result<()> {
        let event = to_kvm(event)?;
        let addr = IoEventAddress::Mmio(addr);
        let result = match (matching, register) {
            (NotifyMatch::Any, true) => self.0.register_ioevent(&event, &addr, NoDatamatch),
            (NotifyMatch::Any, false) => self.0.unregister_ioevent(&event, &addr, NoDatamatch),
            (NotifyMatch::U32(value), true) => self.0.register_ioevent(&event, &addr, value),
            (NotifyMatch::U32(value), false) => self.0.unregister_ioevent(&event, &addr, value),
        };
        Ok(result?)
    }
}

impl IoEventFds for KvmIoEventFds {
    fn register(&self, addr: u64, matching: NotifyMatch, event: &VirtioEventFd) -> io::Result<()> {
        self.call(addr, matching, event, true)
    }

    fn unregister(&self, addr: u64, matching: NotifyMatch, event: &VirtioEventFd) {
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
