//! What a machine tells its owner: the guest wants to stop, or cannot go on.
//!
//! vCPU threads post, the owner takes; a descriptor becomes readable when there is something to take.
//!
//! An end is an end: while one waits to be taken, others that are posted are dropped. A guest that asks for its end over and over, while
//! its owner is busy, costs no memory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rustix::event::{EventfdFlags, eventfd};

/// Something that ends a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest switched its power off.
    PowerOff,
    /// The guest reset itself; a microVM is used once, so this ends it too.
    Reset,
    /// The guest shut down without saying why: a triple fault, or a kernel that reboots by one.
    TripleFault(VcpuFault),
    /// KVM cannot run the guest any further.
    Fatal(VcpuFault),
    /// Pages of the guest cannot be had any more, for this reason.
    MemoryLost(String),
}

/// Where a vCPU was when it could not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuFault {
    /// Which vCPU.
    pub vcpu: u8,
    /// What KVM said, in words.
    pub reason: String,
    /// The instruction pointer, and the instruction's bytes as far as they can be read.
    pub place: Option<(u64, Vec<u8>)>,
}

impl std::fmt::Display for VcpuFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vCPU {}: {}", self.vcpu, self.reason)?;
        match &self.place {
            Some((rip, bytes)) if bytes.is_empty() => {
                write!(f, " at RIP {rip:#x}, where no memory is mapped")
            }
            Some((rip, bytes)) => write!(f, " at RIP {rip:#x}, instruction bytes {bytes:02x?}"),
            None => write!(f, " (its registers cannot be read)"),
        }
    }
}

/// The posting end; cheap to clone.
#[derive(Debug)]
pub struct EventSink {
    sender: SyncSender<MachineEvent>,
    wake: OwnedFd,
    last_resort: fn(),
}

/// The taking end.
#[derive(Debug)]
pub struct EventSource {
    receiver: Receiver<MachineEvent>,
    wake: OwnedFd,
}

/// A connected pair.
pub fn event_channel() -> std::io::Result<(EventSink, EventSource)> {
    let (sender, receiver) = sync_channel(1);
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let sink = EventSink { sender, wake: wake.try_clone()?, last_resort: || std::process::exit(1) };
    Ok((sink, EventSource { receiver, wake }))
}

impl EventSink {
    /// Posts an event, if none waits. (An owner that is gone does not want it any more.)
    pub fn post(&self, event: MachineEvent) {
        if self.sender.try_send(event).is_ok() {
            // The counter can only be full when it is readable anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Another posting end for the same owner.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let EventSink { sender, wake, last_resort } = self;
        Ok(EventSink { sender: sender.clone(), wake: wake.try_clone()?, last_resort: *last_resort })
    }

    /// The same, with another way for the process to end where its owner does not hear that the guest has to. It is exit status 1 if
    /// nothing else is said.
    #[must_use]
    pub fn with_last_resort(self, last_resort: fn()) -> Self {
        EventSink { last_resort, ..self }
    }

    /// Ends the process: its owner was told and has not heard.
    pub(crate) fn end_process(&self) {
        (self.last_resort)();
    }
}

impl EventSource {
    /// The next event, if any. Call until `None` after the descriptor became readable.
    pub fn take(&self) -> Option<MachineEvent> {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
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
    fn the_first_end_is_taken_and_those_that_follow_it_cost_nothing() {
        let (sink, source) = event_channel().unwrap();
        let another = sink.try_clone().unwrap();
        sink.post(MachineEvent::PowerOff);
        for _ in 0..1000 {
            another.post(MachineEvent::Reset);
        }
        assert_eq!((source.take(), source.take()), (Some(MachineEvent::PowerOff), None));
    }

    #[test]
    fn the_descriptor_is_readable_while_an_event_waits() {
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
