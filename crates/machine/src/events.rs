//! What a machine's threads report to its owner: the events that end a guest, and notices about a
//! guest that continues.
//!
//! Threads post; the owner takes. A descriptor is readable while an event or a notice waits.
//!
//! # Invariants
//!
//! - The first event decides. While it waits to be taken, later ones are dropped, so that a guest
//!   that keeps asking for its end uses no memory.
//! - Notices have a queue of their own: a guest that panics and then resets is reported as both. At
//!   most [`MAX_NOTICES`] wait; more are counted and dropped.
//! - A notice that a thread posted before an event is there when the owner has taken the event.

use std::collections::VecDeque;
use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use sync::{EventFd, locked};
use virtio::transport::FailureObserver;

/// Most notices that wait for the owner.
const MAX_NOTICES: usize = 64;

/// Something that ends a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest powered off.
    PowerOff,
    /// A debugger killed the guest.
    Killed,
    /// The guest reset itself. This ends it too: a microVM does not reboot.
    Reset,
    /// A triple fault: a crash, or a kernel that reboots by one.
    TripleFault(VcpuFault),
    /// KVM cannot run the guest any more.
    Fatal(VcpuFault),
    /// Missing pages of guest memory will not arrive, for this reason.
    MemoryLost(String),
}

/// The state of a vCPU that KVM cannot run any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuFault {
    /// The vCPU's number.
    pub vcpu: u8,
    /// What KVM reported.
    pub reason: String,
    /// The instruction pointer, and the bytes there as far as they can be read. `None` if the
    /// registers cannot be read.
    pub instruction: Option<(u64, Vec<u8>)>,
}

impl std::fmt::Display for VcpuFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vCPU {}: {}", self.vcpu, self.reason)?;
        match &self.instruction {
            Some((rip, bytes)) if bytes.is_empty() => {
                write!(f, " at RIP {rip:#x}, where no memory is mapped")
            }
            Some((rip, bytes)) => write!(f, " at RIP {rip:#x}, instruction bytes {bytes:02x?}"),
            None => write!(f, " (its registers cannot be read)"),
        }
    }
}

/// Something that happened to a guest that continues.
///
/// A guest can cause both at will. So each is posted for the first, second, fourth, eighth, … time,
/// with `times`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The guest's kernel panicked, and said so to its pvpanic device.
    GuestPanic {
        /// Whether a crash kernel takes over, to save a dump.
        crash_kernel: bool,
        /// How often it has panicked.
        times: u64,
    },
    /// A device has failed.
    DeviceError {
        /// The device's name, as in `drive rootfs`.
        device: String,
        /// Why.
        error: String,
        /// Whether the device does nothing until its driver resets it.
        needs_reset: bool,
        /// How often it has failed like this.
        times: u64,
    },
}

/// The notices that the owner takes at a time.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Notices {
    /// The notices, in the order in which they were posted.
    pub list: Vec<Notice>,
    /// How many were dropped after these, because too many waited.
    pub dropped: u64,
}

/// Posts notices. Clones have the same owner.
#[derive(Debug, Clone)]
pub struct NoticeSink(Arc<NoticeQueue>);

#[derive(Debug)]
struct NoticeQueue {
    waiting: Mutex<Waiting>,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Waiting {
    notices: VecDeque<Notice>,
    dropped: u64,
}

/// Posts events.
#[derive(Debug)]
pub struct EventSink {
    sender: SyncSender<MachineEvent>,
    wake: EventFd,
    notices: NoticeSink,
    last_resort: fn(),
}

/// Takes events and notices.
#[derive(Debug)]
pub struct EventSource {
    receiver: Receiver<MachineEvent>,
    notices: NoticeSink,
}

/// Creates a connected pair.
pub fn event_channel() -> std::io::Result<(EventSink, EventSource)> {
    let (sender, receiver) = sync_channel(1);
    let wake = EventFd::new()?;
    let notices = NoticeSink(Arc::new(NoticeQueue { waiting: Mutex::default(), wake: wake.try_clone()? }));
    let source = EventSource { receiver, notices: notices.clone() };
    Ok((EventSink { sender, wake, notices, last_resort: || std::process::exit(1) }, source))
}

impl NoticeSink {
    /// Posts a notice. It is dropped and counted if too many wait.
    pub fn post(&self, notice: Notice) {
        let mut waiting = locked(&self.0.waiting);
        if waiting.notices.len() < MAX_NOTICES {
            waiting.notices.push_back(notice);
        } else {
            waiting.dropped += 1;
        }
        drop(waiting);
        self.0.wake.signal();
    }
}

impl FailureObserver for NoticeSink {
    fn device_needs_reset(&self, name: &str, why: &dyn Display, times: u64) {
        let (device, error) = (name.to_owned(), why.to_string());
        self.post(Notice::DeviceError { device, error, needs_reset: true, times });
    }
}

impl EventSink {
    /// Posts an event. Dropped if another waits, or if the owner is gone.
    pub fn post(&self, event: MachineEvent) {
        if self.sender.try_send(event).is_ok() {
            self.wake.signal();
        }
    }

    /// Another sink for the same owner. Fails if the process is out of descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let EventSink { sender, wake, notices, last_resort } = self;
        let (sender, notices) = (sender.clone(), notices.clone());
        Ok(EventSink { sender, wake: wake.try_clone()?, notices, last_resort: *last_resort })
    }

    /// Posts notices to the same owner.
    pub fn notices(&self) -> NoticeSink {
        self.notices.clone()
    }

    /// The same sink with another `last_resort`, which ends the process if its owner does not react
    /// to an event in time. Without one the process exits with status 1.
    #[must_use]
    pub fn with_last_resort(self, last_resort: fn()) -> Self {
        EventSink { last_resort, ..self }
    }

    /// Ends the process, whose owner did not react to an event.
    pub(crate) fn end_process(&self) {
        (self.last_resort)();
    }
}

impl EventSource {
    /// The next event, if any. Call it until `None` after the descriptor became readable.
    pub fn take(&self) -> Option<MachineEvent> {
        self.notices.0.wake.take();
        self.receiver.try_recv().ok()
    }

    /// The notices that wait. Call it after [`Self::take`], which makes the descriptor unreadable
    /// until the next event or notice.
    pub fn take_notices(&self) -> Notices {
        let Waiting { notices, dropped } = std::mem::take(&mut *locked(&self.notices.0.waiting));
        Notices { list: notices.into(), dropped }
    }
}

impl AsFd for EventSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notices.0.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_of_many_events_is_kept() {
        let (sink, source) = event_channel().unwrap();
        let another = sink.try_clone().unwrap();
        sink.post(MachineEvent::PowerOff);
        for _ in 0..1000 {
            another.post(MachineEvent::Reset);
        }
        assert_eq!((source.take(), source.take()), (Some(MachineEvent::PowerOff), None));
    }

    #[test]
    fn descriptor_is_readable_while_an_event_waits() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let (sink, source) = event_channel().unwrap();
        let waits = || {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&source, PollFlags::IN)], Some(&now)).unwrap() == 1
        };
        assert!(!waits());
        for _ in 0..2 {
            sink.post(MachineEvent::Reset);
            assert!(waits());
            assert!(source.take().is_some() && !waits());
        }
        sink.notices().post(panic(1));
        assert!(waits() && source.take().is_none() && !waits());
        assert_eq!(source.take_notices().list, [panic(1)]);
    }

    fn panic(times: u64) -> Notice {
        Notice::GuestPanic { crash_kernel: false, times }
    }

    #[test]
    fn notices_do_not_displace_the_event_that_ends_the_guest() {
        let (sink, source) = event_channel().unwrap();
        sink.notices().post(panic(1));
        sink.post(MachineEvent::Reset);
        assert_eq!(source.take(), Some(MachineEvent::Reset));
        assert_eq!(source.take_notices(), Notices { list: vec![panic(1)], dropped: 0 });
        assert_eq!(source.take_notices(), Notices::default());
    }

    #[test]
    fn notices_beyond_the_bound_are_counted() {
        let (sink, source) = event_channel().unwrap();
        let notices = sink.notices();
        let count = MAX_NOTICES as u64 + 5;
        (0..count).for_each(|times| notices.post(panic(times)));
        let taken = source.take_notices();
        assert_eq!((taken.list.len(), taken.dropped), (MAX_NOTICES, 5));
        assert_eq!(taken.list[0], panic(0), "the first ones are kept");
    }

    #[test]
    fn device_that_needs_a_reset_is_a_notice() {
        let (sink, source) = event_channel().unwrap();
        sink.notices().device_needs_reset("drive a", &"queue 0 is invalid", 2);
        let [Notice::DeviceError { device, error, needs_reset: true, times: 2 }] =
            &source.take_notices().list[..]
        else {
            panic!("another notice")
        };
        assert_eq!((device.as_str(), error.as_str()), ("drive a", "queue 0 is invalid"));
    }
}
