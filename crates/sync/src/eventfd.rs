//! Eventfds: how kicks, interrupts and wake-ups travel between threads and KVM.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::EventfdFlags;
use rustix::io::Errno;

/// A non-blocking, close-on-exec eventfd.
///
/// KVM signals it for a kick (ioeventfd), and takes it as the source of an interrupt (irqfd).
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    /// Creates an eventfd whose counter is 0.
    pub fn new() -> std::io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(EventFd { fd })
    }

    /// Duplicates the descriptor. Both share one counter.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(EventFd { fd: self.fd.try_clone()? })
    }

    /// Adds one to the counter, which wakes the threads that poll it.
    ///
    /// A full counter (2^64 - 2 unread signals) stays full. Its reader is awake already.
    pub fn signal(&self) {
        let wrote = rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, &1u64.to_ne_bytes()));
        debug_assert!(matches!(wrote, Ok(8) | Err(Errno::AGAIN)), "an eventfd takes a write: {wrote:?}");
    }

    /// Reads the counter and sets it to 0. Never blocks. 0 means that nothing was signalled.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut count)) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

impl From<EventFd> for OwnedFd {
    fn from(event: EventFd) -> OwnedFd {
        event.fd
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_add_up_until_taken() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.take(), 0);
        event.signal();
        event.signal();
        assert_eq!(event.take(), 2);
        assert_eq!(event.take(), 0);
    }

    #[test]
    fn a_full_counter_takes_another_signal_without_blocking() {
        let event = EventFd::new().unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal();
        assert_eq!(event.take(), u64::MAX - 1);
    }
}
