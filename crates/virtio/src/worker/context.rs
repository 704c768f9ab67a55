//! The interface of a worker to its tasks: descriptors to watch, timers, the clock.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};

use super::clock::{Clock, Nanos};
use sync::EventFd;

/// A task's number for a descriptor that it watches. Unique within the task.
pub type Token = u32;

/// The conditions to wait for on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// The descriptor is readable, or its peer hung up.
    pub read: bool,
    /// The descriptor is writable.
    pub write: bool,
}

impl Interest {
    /// Wait until it is readable.
    pub const READ: Interest = Interest { read: true, write: false };
    /// Wait until it is writable.
    pub const WRITE: Interest = Interest { read: false, write: true };
    /// Wait for either.
    pub const BOTH: Interest = Interest { read: true, write: true };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN | EventFlags::RDHUP, self.read);
        flags.set(EventFlags::OUT, self.write);
        flags
    }
}

/// A watched descriptor is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The task's number for the descriptor.
    pub token: Token,
    /// It is readable.
    pub readable: bool,
    /// It is writable.
    pub writable: bool,
    /// The peer hung up, or the descriptor has an error. A read or a write returns which.
    pub hangup: bool,
}

/// The registrations of one task: watched descriptors and timer.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    /// The slot of the task, and a generation that tells events of a former task in it apart.
    pub(super) slot: u16,
    pub(super) life: u16,
    watches: BTreeMap<u32, Watched>,
    pub(super) timer: Option<Nanos>,
    pub(super) again: bool,
}

impl Registrations {
    /// Ends the registrations. Events of this task that are already queued are then dropped.
    pub(super) fn clear(&mut self) {
        self.life = self.life.wrapping_add(1);
        self.timer = None;
        self.again = false;
    }

    pub(super) fn is_watching(&self, token: Token) -> bool {
        self.watches.contains_key(&token)
    }
}

/// A watched descriptor. It is kept open, so that a task cannot leave a registration behind: epoll
/// drops one only when the last copy is closed.
#[derive(Debug)]
enum Watched {
    Kick(Arc<EventFd>),
    Fd(OwnedFd),
    Shared(Arc<OwnedFd>),
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Watched::Kick(event) => event.as_fd(),
            Watched::Fd(fd) => fd.as_fd(),
            Watched::Shared(fd) => fd.as_fd(),
        }
    }
}

/// The largest [`Token`]: one bit of the kernel's 64 says whether an event is a kick.
pub const MAX_TOKEN: Token = (1 << 31) - 1;

/// The 64 bits that the kernel returns with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EventKey {
    pub(super) slot: u16,
    pub(super) life: u16,
    pub(super) kick: bool,
    pub(super) token: Token,
}

impl EventKey {
    const KICK: u64 = 1 << 31;

    pub(super) fn to_bits(self) -> u64 {
        let kick = if self.kick { Self::KICK } else { 0 };
        u64::from(self.slot) << 48 | u64::from(self.life) << 32 | kick | u64::from(self.token)
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        EventKey {
            slot: (bits >> 48) as u16,
            life: (bits >> 32) as u16,
            kick: bits & Self::KICK != 0,
            token: bits as u32 & MAX_TOKEN,
        }
    }
}

/// The worker's interface to the task that it calls.
#[derive(Debug)]
pub struct Context<'a> {
    pub(super) epoll: BorrowedFd<'a>,
    pub(super) registrations: &'a mut Registrations,
    pub(super) clock: &'a mut Clock,
}

impl Context<'_> {
    /// Calls [`Task::kicked`](super::task::Task::kicked) with `token` when `kick` is signalled. The
    /// counter is never read.
    pub fn watch_kick(&mut self, token: Token, kick: &Arc<EventFd>) -> io::Result<()> {
        self.add(token, Watched::Kick(Arc::clone(kick)), EventFlags::IN | EventFlags::ET, true)
    }

    /// Calls [`Task::ready`](super::task::Task::ready) with `token` as long as a condition of
    /// `interest` holds (level-triggered), until [`Context::unwatch`].
    ///
    /// The worker keeps a copy of `fd`, so that the peer sees a close only after `unwatch`.
    pub fn watch(&mut self, token: Token, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        self.add(token, Watched::Fd(fd), interest.flags(), false)
    }

    /// As [`Context::watch`], but edge-triggered.
    pub fn watch_edge(&mut self, token: Token, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        self.add(token, Watched::Fd(fd), interest.flags() | EventFlags::ET, false)
    }

    /// As [`Context::watch_edge`], but shares `fd` with the task instead of copying it, for tasks
    /// with thousands of descriptors.
    pub fn watch_shared(&mut self, token: Token, fd: &Arc<OwnedFd>, interest: Interest) -> io::Result<()> {
        self.add(token, Watched::Shared(Arc::clone(fd)), interest.flags() | EventFlags::ET, false)
    }

    /// Changes the conditions of the edge-triggered descriptor `token`. One that holds already
    /// gives an event.
    pub fn change_edge(&mut self, token: Token, interest: Interest) -> io::Result<()> {
        self.modify(token, interest.flags() | EventFlags::ET)
    }

    /// Changes the conditions of the level-triggered descriptor `token`.
    pub fn change_interest(&mut self, token: Token, interest: Interest) -> io::Result<()> {
        self.modify(token, interest.flags())
    }

    fn modify(&mut self, token: Token, flags: EventFlags) -> io::Result<()> {
        let watched = self.registrations.watches.get(&token).ok_or(io::ErrorKind::NotFound)?;
        let key =
            EventKey { slot: self.registrations.slot, life: self.registrations.life, kick: false, token };
        Ok(epoll::modify(self.epoll, watched, EventData::new_u64(key.to_bits()), flags)?)
    }

    /// Unwatches `token`. An event that is already queued may still come.
    pub fn unwatch(&mut self, token: Token) {
        if let Some(watched) = self.registrations.watches.remove(&token) {
            let deleted = epoll::delete(self.epoll, &watched);
            debug_assert!(deleted.is_ok(), "a watched descriptor can be unwatched: {deleted:?}");
        }
    }

    /// Unwatches all descriptors.
    pub(super) fn unwatch_all(&mut self) {
        while let Some((&token, _)) = self.registrations.watches.first_key_value() {
            self.unwatch(token);
        }
    }

    /// Calls [`Task::timer`](super::task::Task::timer) once at `at`, or soon if `at` has passed. A
    /// later call replaces the time.
    pub fn set_timer(&mut self, at: Nanos) {
        self.registrations.timer = Some(at);
    }

    /// Clears the timer.
    pub fn clear_timer(&mut self) {
        self.registrations.timer = None;
    }

    /// Calls [`Task::timer`](super::task::Task::timer) after the other tasks had their turn.
    pub fn reschedule(&mut self) {
        self.registrations.again = true;
    }

    /// The time of the monotonic clock. It is read at most once per wake-up of the worker.
    pub fn now(&mut self) -> Nanos {
        self.clock.now()
    }

    /// Reads the monotonic clock now, for durations within a wake-up.
    pub fn read_clock(&self) -> Nanos {
        self.clock.read()
    }

    fn add(&mut self, token: Token, watched: Watched, flags: EventFlags, kick: bool) -> io::Result<()> {
        if token > MAX_TOKEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.registrations.watches.contains_key(&token) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let key = EventKey { slot: self.registrations.slot, life: self.registrations.life, kick, token };
        epoll::add(self.epoll, &watched, EventData::new_u64(key.to_bits()), flags)?;
        self.registrations.watches.insert(token, watched);
        Ok(())
    }
}
