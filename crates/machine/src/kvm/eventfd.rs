//! Eventfds at the border to `kvm-ioctls`, which takes the type of `vmm-sys-util`.
//!
//! Everything else in this crate uses [`sync::EventFd`].

#![expect(unsafe_code, reason = "a descriptor is lent to the type of another crate")]

use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd};

use sync::EventFd;
use vmm_sys_util::eventfd::EventFd as KvmEventFd;

/// An eventfd as `kvm-ioctls` takes it. The descriptor stays that of the [`EventFd`] that lends it.
pub(crate) struct BorrowedEventFd<'a> {
    event: ManuallyDrop<KvmEventFd>,
    lender: PhantomData<&'a EventFd>,
}

/// Lends `event` to a call of `kvm-ioctls`.
pub(crate) fn lend(event: &EventFd) -> BorrowedEventFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed, which the lifetime of the
    // result says. The result never closes it: `ManuallyDrop` keeps the second owner from being
    // dropped, and `BorrowedEventFd` only gives out references to it.
    let event = unsafe { KvmEventFd::from_raw_fd(event.as_raw_fd()) };
    BorrowedEventFd { event: ManuallyDrop::new(event), lender: PhantomData }
}

impl Deref for BorrowedEventFd<'_> {
    type Target = KvmEventFd;

    fn deref(&self) -> &KvmEventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lent_eventfd_shares_its_counter_and_stays_open() {
        let event = EventFd::new().unwrap();
        for _ in 0..2 {
            lend(&event).write(3).unwrap();
            assert_eq!(event.take(), 3);
        }
    }
}
