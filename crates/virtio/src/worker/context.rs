//! What a task can ask of its worker.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};

use super::{Nanos, Token};
use sync::EventFd;

/// What to wait for on a descriptor. Level-triggered: an event comes as long as the condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// There is something to read, or the other side hung up.
    pub read: bool,
    /// There is room to write.
    pub write: bool,
}

impl Interest {
    /// Wait for something to read.
    pub const READ: Interest = Interest { read: true, write: false };
    /// Wait for room to write.
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
    /// What the task called it.
    pub token: Token,
    /// There is something to read.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The other side hung up, or the descriptor is in error: a read or write tells which.
    pub hangup: bool,
}

/// A place on a worker: what one task watches and when it wants to be called.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    /// Where the worker keeps the task, and how often the place was taken before: stale events are told apart by it.
    pub(super) slot: u16,
    pub(super) life: u16,
    watches: BTreeMap<u32, Watched>,
    pub(super) timer: Option<Nanos>,
    pub(super) again: bool,
}

impl Registrations {
    /// The task goes: events that are still on their way are not for the next one.
    pub(super) fn clear(&mut self) {
        self.life = self.life.wrapping_add(1);
        self.timer = None;
        self.again = false;
    }

    pub(super) fn is_watching(&self, token: Token) -> bool {
        self.watches.contains_key(&token)
    }
}

/// A watched descriptor. Copies (`dup`) of what is not counted, so that a task cannot leave a registration behind.
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

/// The 64 bits that the kernel gives back with an event.
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

/// What a task can ask of the worker that calls it.
#[derive(Debug)]
pub struct Context<'a> {
    pub(super) epoll: BorrowedFd<'a>,
    pub(super) registrations: &'a mut Registrations,
    pub(super) clock: &'a mut Clock,
}

impl Context<'_> {
    /// Calls [`Task::kicked`](super::Task::kicked) with `token` when `kick` is signalled. The counter is never read.
    pub fn watch_kick(&mut self, token: Token, kick: &Arc<EventFd>) -> io::Result<()> {
        self.add(token, Watched::Kick(Arc::clone(kick)), EventFlags::IN | EventFlags::ET, true)
    }

    /// Calls [`Task::ready`](super::Task::ready) with `token` while `fd` is as `interest` says, until
    /// [`Context::unwatch`]. The worker keeps a copy of `fd`: unwatch before a close has to reach the other side.
    pub fn watch(&mut self, token: Token, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        self.add(token, Watched::Fd(fd), interest.flags(), false)
    }

    /// As [`Context::watch`], edge-triggered: an event comes whenever something new happens, and nothing needs to be read.
    pub fn watch_edge(&mut self, token: Token, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        self.add(token, Watched::Fd(fd), interest.flags() | EventFlags::ET, false)
    }

    /// As [`Context::watch_edge`], of a descriptor that the task shares with its worker instead of having it copied: for tasks with
    /// thousands of them.
    pub fn watch_shared(&mut self, token: Token, fd: &Arc<OwnedFd>, interest: Interest) -> io::Result<()> {
        self.add(token, Watched::Shared(Arc::clone(fd)), interest.flags() | EventFlags::ET, false)
    }

    /// Waits for something else on the edge-triggered descriptor `token` from now on. What is so already gives an event, too.
    pub fn change_edge(&mut self, token: Token, interest: Interest) -> io::Result<()> {
        self.modify(token, interest.flags() | EventFlags::ET)
    }

    /// Waits for something else on the (level-triggered) descriptor `token` from now on.
    pub fn change_interest(&mut self, token: Token, interest: Interest) -> io::Result<()> {
        self.modify(token, interest.flags())
    }

    fn modify(&mut self, token: Token, flags: EventFlags) -> io::Result<()> {
        let watched = self.registrations.watches.get(&token).ok_or(io::ErrorKind::NotFound)?;
        let key =
            EventKey { slot: self.registrations.slot, life: self.registrations.life, kick: false, token };
        Ok(epoll::modify(self.epoll, watched, EventData::new_u64(key.to_bits()), flags)?)
    }

    /// Watches `token` no more. An event that is on its way may still come.
    pub fn unwatch(&mut self, token: Token) {
        if let Some(watched) = self.registrations.watches.remove(&token) {
            let deleted = epoll::delete(self.epoll, &watched);
            debug_assert!(deleted.is_ok(), "a watched descriptor can be unwatched: {deleted:?}");
        }
    }

    /// Watches nothing any more.
    pub(super) fn unwatch_all(&mut self) {
        while let Some((&token, _)) = self.registrations.watches.first_key_value() {
            self.unwatch(token);
        }
    }

    /// Calls [`Task::timer`](super::Task::timer) at `at` (once; a later call moves it). At or before now means soon.
    pub fn set_timer(&mut self, at: Nanos) {
        self.registrations.timer = Some(at);
    }

    /// No timer.
    pub fn clear_timer(&mut self) {
        self.registrations.timer = None;
    }

    /// Calls [`Task::timer`](super::Task::timer) again after others had their turn.
    pub fn reschedule(&mut self) {
        self.registrations.again = true;
    }

    /// The monotonic clock, read at most once per wake-up of the worker.
    pub fn now(&mut self) -> Nanos {
        self.clock.now()
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

/// The clock of a worker: read at most once per wake-up.
#[derive(Debug)]
pub(crate) struct Clock {
    source: fn() -> Nanos,
    now: Option<Nanos>,
    /// Whether it goes on by itself, as the kernel's timers do.
    pub(super) ticks: bool,
}

impl Clock {
    /// The kernel's.
    pub(super) fn monotonic() -> Self {
        Clock { source: monotonic, now: None, ticks: true }
    }

    /// One that a test sets.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn manual(source: fn() -> Nanos) -> Self {
        Clock { source, now: None, ticks: false }
    }

    /// The time of this wake-up.
    pub(super) fn now(&mut self) -> Nanos {
        *self.now.get_or_insert_with(self.source)
    }

    /// A new wake-up.
    pub(super) fn forget(&mut self) {
        self.now = None;
    }
}

/// The kernel's monotonic clock.
pub fn monotonic() -> Nanos {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
