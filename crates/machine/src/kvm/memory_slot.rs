//! Memory slots: guest RAM as KVM knows it.

#![expect(unsafe_code, reason = "KVM takes the addresses of guest memory")]

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use memory::GuestRam;

use super::error::{Ioctl, KvmError};

/// Adds a slot for each region of `ram`, numbered as regions are. With `log_dirty`, KVM logs the
/// pages that the guest writes.
pub(super) fn add_all(vm: &VmFd, ram: &GuestRam, log_dirty: bool) -> Result<(), KvmError> {
    let flags = if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    for (slot, region) in (0..).zip(ram.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.guest_addr,
            memory_size: region.size,
            userspace_addr: region.host_addr,
        };
        // SAFETY: the region is guest RAM of exactly this size. The addresses of a `GuestRam` are
        // never unmapped, so the slot may outlive it. Its regions do not overlap.
        unsafe { vm.set_user_memory_region(region) }.ioctl("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}
