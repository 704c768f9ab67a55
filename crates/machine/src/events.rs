//! The events that end a guest, from the machine's threads to its owner.
//!
//! Threads post events; the owner takes them. A descriptor is readable while an event waits.
//!
//! The first event decides. While it waits to be taken, later ones are dropped, so that a guest
//! that keeps asking for its end uses no memory.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sync::EventFd;

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

/// Posts events.
#[derive(Debug)]
pub struct EventSink {
    sender: SyncSender<MachineEvent>,
    wake: EventFd,
    last_resort: fn(),
}

/// Takes events.
#[derive(Debug)]
pub struct EventSource {
    receiver: Receiver<MachineEvent>,
    wake: EventFd,
}

/// Creates a connected pair.
pub fn event_channel() -> std::io::Result<(EventSink, EventSource)> {
    let (sender, receiver) = sync_channel(1);
    let wake = EventFd::new()?;
    let sink = EventSink { sender, wake: wake.try_clone()?, last_resort: || std::process::exit(1) };
    Ok((sink, EventSource { receiver, wake }))
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
        let EventSink { sender, wake, last_resort } = self;
        Ok(EventSink { sender: sender.clone(), wake: wake.try_clone()?, last_resort: *last_resort })
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
        self.wake.take();
        self.receiver.try_recv().ok()
    }
}

impl AsFd for EventSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
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
    }
}
