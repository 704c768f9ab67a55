//! Queue notifications: KVM's ioeventfds.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use sync::EventFd;
use virtio::transport::{IoEventFds, NotifyMatch};

use crate::kvm::lend;

/// Registers ioeventfds on memory-mapped addresses with KVM.
pub(super) struct KvmIoEventFds(pub(super) Arc<VmFd>);

impl IoEventFds for KvmIoEventFds {
    fn register(&self, addr: u64, matching: NotifyMatch, event: &EventFd) -> io::Result<()> {
        let (event, addr) = (lend(event), IoEventAddress::Mmio(addr));
        match matching {
            NotifyMatch::Any => self.0.register_ioevent(&event, &addr, NoDatamatch)?,
            NotifyMatch::U32(value) => self.0.register_ioevent(&event, &addr, value)?,
        }
        Ok(())
    }

    fn unregister(&self, addr: u64, matching: NotifyMatch, event: &EventFd) {
        let (event, at) = (lend(event), IoEventAddress::Mmio(addr));
        let unregistered = match matching {
            NotifyMatch::Any => self.0.unregister_ioevent(&event, &at, NoDatamatch),
            NotifyMatch::U32(value) => self.0.unregister_ioevent(&event, &at, value),
        };
        if let Err(error) = unregistered {
            log::error!("cannot unregister the ioeventfd at {addr:#x}: {error}");
        }
    }
}
