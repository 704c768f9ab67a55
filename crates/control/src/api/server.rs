//! The API thread: one `epoll` over the listener, the connections and the main thread's wake-ups.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    io::Errno,
    net::{SendFlags, SocketFlags, accept_with, send},
};

use super::{
    channel::Outbox,
    connection::{Connection, Next},
    limits::Limits,
    request_log,
};
use crate::{CommandError, Instance, events::EventLog, http::TOO_MANY_CONNECTIONS};

/// Most events of one `epoll_wait`.
const EVENTS_AT_A_TIME: usize = 16;
/// How long new connections wait if the process has no descriptor or memory for them.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The epoll data of the listener. Connections have the number of their slot.
const LISTENER: u64 = u64::MAX;
/// The epoll data of the main thread's wake-ups.
const WAKE: u64 = u64::MAX - 1;

/// The API thread's state.
pub(super) struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    /// Whether the listener is watched. It is not for [`ACCEPT_PAUSE`] after an accept failed.
    accepting: bool,
    outbox: Outbox,
    instance: Arc<Instance>,
    events: EventLog,
    /// When streams of events get the next comment; `None` without streams.
    comment_at: Option<Instant>,
    limits: Limits,
    /// The connections: at most `limits.max_connections`, allocated when first needed.
    slots: Vec<Option<Slot>>,
}

struct Slot {
    connection: Connection,
    /// The events that epoll watches it for: none until it is opened.
    watched: EventFlags,
    /// Whether the connection is advanced again without an event.
    again: bool,
}

impl Server {
    pub(super) fn new(
        listener: OwnedFd,
        outbox: Outbox,
        (instance, events): (Arc<Instance>, EventLog),
        limits: Limits,
    ) -> Result<Server, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, outbox.wake_fd(), EventData::new_u64(WAKE), EventFlags::IN)?;
        Ok(Server {
            epoll,
            listener,
            accepting: true,
            outbox,
            instance,
            events,
            comment_at: None,
            limits,
            slots: Vec::new(),
        })
    }

    /// Serves until the main thread's end is dropped.
    pub(super) fn run(mut self) {
        request_log::server_started();
        let nothing = Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let mut events = [nothing; EVENTS_AT_A_TIME];
        let mut stopped = false;
        while !stopped {
            let count = self.wait(&mut events);
            stopped = self.outbox.is_stopped();
            let (mut clients_wait, mut woken) = (false, false);
            for event in &events[..count] {
                match event.data.u64() {
                    LISTENER => clients_wait = true,
                    WAKE => {
                        self.outbox.clear_wake();
                        woken = true;
                    }
                    slot => self.advance(slot as usize),
                }
            }
            for slot in 0..self.slots.len() {
                if self.slots[slot].as_mut().is_some_and(|slot| std::mem::take(&mut slot.again)) {
                    self.advance(slot);
                }
            }
            while let Some(answer) = self.outbox.try_recv() {
                if let Some(slot) = self.slots.get_mut(answer.slot).and_then(Option::as_mut) {
                    slot.connection.answer(answer.result);
                    self.advance(answer.slot);
                }
            }
            self.advance_streams(woken);
            // Last, because the other events free slots.
            if clients_wait {
                self.accept();
            }
        }
        self.refuse_all();
    }

    /// Sends streams their events if there may be new ones (`woken`), and a comment if it is time.
    fn advance_streams(&mut self, woken: bool) {
        let comment = self.comment_at.is_some_and(|at| Instant::now() >= at);
        let mut streams = 0;
        for number in 0..self.slots.len() {
            let Some(slot) = self.slots[number].as_mut().filter(|slot| slot.connection.is_stream()) else {
                continue;
            };
            streams += 1;
            if comment {
                slot.connection.put_comment();
            }
            if comment || woken {
                self.advance(number);
            }
        }
        if streams == 0 {
            self.comment_at = None;
        } else if comment || self.comment_at.is_none() {
            self.comment_at = Some(Instant::now() + self.limits.stream_comment_interval);
        }
    }

    /// Answers the connections that still wait with an error, and sends streams their last events.
    fn refuse_all(&mut self) {
        for slot in self.slots.iter_mut().flatten() {
            slot.connection.answer(Err(CommandError::NoAnswer));
            slot.connection.advance(|_| ());
        }
    }

    /// Waits for events. Returns how many there are.
    fn wait(&mut self, events: &mut [Event]) -> usize {
        let timeout = if self.slots.iter().flatten().any(|slot| slot.again) {
            Some(Duration::ZERO)
        } else {
            let comment = self.comment_at.map(|at| at.saturating_duration_since(Instant::now()));
            let accept = (!self.accepting).then_some(ACCEPT_PAUSE);
            comment.into_iter().chain(accept).min()
        };
        let timeout = timeout.map(|time| Timespec::try_from(time).expect("a short time fits"));
        let count = match epoll::wait(&self.epoll, &mut *events, timeout.as_ref()) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => panic!("waiting on an epoll of one's own cannot fail: {error}"),
        };
        if !self.accepting {
            let data = EventData::new_u64(LISTENER);
            self.accepting = epoll::add(&self.epoll, &self.listener, data, EventFlags::IN).is_ok();
        }
        count
    }

    /// Accepts one client. The listener stays readable if more wait.
    fn accept(&mut self) {
        match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => self.open(socket),
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                // The listener would be readable again at once.
                self.accepting = epoll::delete(&self.epoll, &self.listener).is_err();
            }
            // The client hung up meanwhile.
            Err(_) => (),
        }
    }

    fn open(&mut self, socket: OwnedFd) {
        let mut free = self.free_slot();
        if free >= self.limits.max_connections {
            // Clients may have hung up since the last events, and one may only have to hang up.
            (0..self.slots.len()).for_each(|slot| self.advance(slot));
            let lingering = |slot: &Slot| slot.connection.is_lingering();
            if let Some(slot) = self.slots.iter_mut().find(|slot| slot.as_ref().is_none_or(lingering)) {
                *slot = None;
            }
            free = self.free_slot();
        }
        if free >= self.limits.max_connections {
            // The empty send buffer of a new connection takes this. Otherwise the client sees the
            // close.
            let _ = send(&socket, TOO_MANY_CONNECTIONS, SendFlags::NOSIGNAL);
            return;
        }
        let stats = Arc::clone(self.outbox.stats());
        let instance = Arc::clone(&self.instance);
        let connection = Connection::new(socket, (instance, self.events.clone()), &self.limits, stats);
        if free == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[free] = Some(Slot { connection, watched: EventFlags::empty(), again: false });
        self.schedule(free, Next::When(EventFlags::IN));
    }

    /// The first free slot, which may be one more than there are.
    fn free_slot(&self) -> usize {
        self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len())
    }

    /// Advances a connection. A slot that was emptied by an earlier event is skipped.
    fn advance(&mut self, number: usize) {
        let Some(slot) = self.slots.get_mut(number).and_then(Option::as_mut) else { return };
        let next = slot.connection.advance(|command| self.outbox.send(number, command));
        self.schedule(number, next);
    }

    /// Schedules the next step of a connection.
    fn schedule(&mut self, number: usize, next: Next) {
        let Some(slot) = self.slots.get_mut(number).and_then(Option::as_mut) else { return };
        let kept = match next {
            Next::Close => false,
            Next::Again => {
                slot.again = true;
                true
            }
            Next::When(flags) => watch(&self.epoll, number, slot, flags).is_ok(),
        };
        if !kept {
            self.slots[number] = None;
        }
    }
}

/// Has epoll watch a connection for `flags` too.
///
/// It stays watched for what it was before, so that a request costs no call here. That is
/// edge-triggered: each change of the socket is reported once, whether or not the connection waits
/// for it. A client that hangs up while its command is with the main thread is therefore not
/// reported again and again.
fn watch(epoll: &OwnedFd, number: usize, slot: &mut Slot, flags: EventFlags) -> Result<(), Errno> {
    let watched = slot.watched | flags;
    if watched == slot.watched {
        return Ok(());
    }
    let socket = slot.connection.as_fd();
    let data = EventData::new_u64(number as u64);
    if slot.watched.is_empty() {
        epoll::add(epoll, socket, data, watched | EventFlags::ET)?;
    } else {
        epoll::modify(epoll, socket, data, watched | EventFlags::ET)?;
    }
    slot.watched = watched;
    Ok(())
}
