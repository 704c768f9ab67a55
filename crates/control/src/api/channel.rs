//! The channel between the API thread and the main thread: commands one way, answers the other.
//!
//! Each way is a queue and an eventfd that wakes its reader. The queue of commands is bounded by
//! the number of connections: each has at most one command with the main thread.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use rustix::event::{EventfdFlags, eventfd};
use sync::EventFd;

use crate::events::EventLog;
use crate::metrics::ApiStats;
use crate::{Command, CommandError, Reply};
use socket_file::SocketFile;

/// The main thread's end: the commands that clients sent, in the order in which they arrived.
///
/// Its descriptor is readable exactly as long as [`Requests::try_recv`] has a request to return.
/// Dropping it removes the socket file and ends the API thread, which answers the open requests
/// with an error.
#[derive(Debug)]
pub struct Requests {
    inbox: mpsc::Receiver<Request>,
    /// Requests that were taken and put back. They come before those in `inbox`.
    requeued: RefCell<VecDeque<Request>>,
    /// A semaphore that counts the requests in `requeued` and `inbox`.
    arrived: Arc<OwnedFd>,
    api: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
    stats: Arc<ApiStats>,
    socket_file: Option<SocketFile>,
}

/// A command of a client that waits for the answer.
#[derive(Debug)]
pub struct Request {
    /// The command.
    pub command: Command,
    /// The way back to the client.
    pub reply_to: ReplyTo,
}

/// The way back to the client. Dropping it without an answer sends [`CommandError::NoAnswer`].
#[derive(Debug)]
pub struct ReplyTo {
    slot: usize,
    answers: mpsc::Sender<Answer>,
    api: Arc<Waker>,
    answered: bool,
}

/// An answer of the main thread.
#[derive(Debug)]
pub(super) struct Answer {
    /// The slot of the connection that asked.
    pub(super) slot: usize,
    pub(super) result: Result<Reply, CommandError>,
}

/// The API thread's end.
#[derive(Debug)]
pub(super) struct Outbox {
    commands: mpsc::Sender<Request>,
    arrived: Arc<OwnedFd>,
    answers: mpsc::Receiver<Answer>,
    to_answer: mpsc::Sender<Answer>,
    api: Arc<Waker>,
    stats: Arc<ApiStats>,
}

/// Wakes the API thread, and tells it when to end.
#[derive(Debug)]
struct Waker {
    event: EventFd,
    stop: AtomicBool,
}

/// Both ends, with no thread between them yet.
///
/// `events` wake the API thread too.
pub(super) fn channel(socket_file: SocketFile, events: &EventLog) -> io::Result<(Requests, Outbox)> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let arrived = Arc::new(eventfd(0, flags | EventfdFlags::SEMAPHORE)?);
    let api = Arc::new(Waker { event: EventFd::new()?, stop: AtomicBool::new(false) });
    events.set_wake(api.event.try_clone()?);
    let (commands, inbox) = mpsc::channel();
    let (to_answer, answers) = mpsc::channel();
    let stats = Arc::<ApiStats>::default();
    let outbox = Outbox {
        commands,
        arrived: Arc::clone(&arrived),
        answers,
        to_answer,
        api: Arc::clone(&api),
        stats: Arc::clone(&stats),
    };
    let requeued = RefCell::default();
    let socket_file = Some(socket_file);
    Ok((Requests { inbox, requeued, arrived, api, thread: None, stats, socket_file }, outbox))
}

impl Requests {
    /// Sets the API thread, which is joined at the end.
    pub(super) fn set_thread(&mut self, thread: JoinHandle<()>) {
        self.thread = Some(thread);
    }

    /// What the API thread counts.
    pub(crate) fn stats(&self) -> Arc<ApiStats> {
        Arc::clone(&self.stats)
    }

    /// The next request, if there is one. Does not wait.
    pub fn try_recv(&self) -> Option<Request> {
        // One count is one request, and the request went in first.
        let mut count = [0; 8];
        rustix::io::read(&*self.arrived, &mut count).ok()?;
        let first = self.requeued.borrow_mut().pop_front();
        first.or_else(|| self.inbox.try_recv().ok())
    }

    /// Puts requests back that [`Self::try_recv`] returned and that have to wait. They are the next
    /// ones, in this order.
    pub fn requeue(&self, requests: Vec<Request>) {
        let count = requests.len() as u64;
        if count == 0 {
            return;
        }
        let mut waiting = self.requeued.borrow_mut();
        requests.into_iter().rev().for_each(|request| waiting.push_front(request));
        let written = rustix::io::write(&*self.arrived, &count.to_ne_bytes());
        debug_assert!(written.is_ok(), "at most one count per connection");
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.arrived.as_fd()
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // First no new clients. Then the thread, which sends the last answers and refuses the rest.
        self.socket_file = None;
        self.api.stop.store(true, Ordering::Release);
        self.api.event.signal();
        if let Some(thread) = self.thread.take() {
            // An error is a panic of the thread, which was logged.
            let _ = thread.join();
        }
    }
}

impl ReplyTo {
    /// Answers the client, which may have hung up. Does not wait.
    pub fn send(mut self, result: Result<Reply, CommandError>) {
        self.answer(result);
    }

    fn answer(&mut self, result: Result<Reply, CommandError>) {
        self.answered = true;
        // It fails only if the API thread has ended, and the connection with it.
        if self.answers.send(Answer { slot: self.slot, result }).is_ok() {
            self.api.event.signal();
        }
    }
}

impl Drop for ReplyTo {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(Err(CommandError::NoAnswer));
        }
    }
}

impl Outbox {
    /// Sends `command` to the main thread. An answer for `slot` always follows.
    pub(super) fn send(&self, slot: usize, command: Command) {
        let reply_to =
            ReplyTo { slot, answers: self.to_answer.clone(), api: Arc::clone(&self.api), answered: false };
        // If the main thread has dropped its end, the dropped request answers itself.
        if self.commands.send(Request { command, reply_to }).is_ok() {
            let written = rustix::io::write(&*self.arrived, &1_u64.to_ne_bytes());
            debug_assert!(written.is_ok(), "at most one count per connection");
        }
    }

    /// What this thread counts.
    pub(super) fn stats(&self) -> &Arc<ApiStats> {
        &self.stats
    }

    /// The next answer, if there is one.
    pub(super) fn try_recv(&self) -> Option<Answer> {
        self.answers.try_recv().ok()
    }

    /// A descriptor that is readable when there may be an answer or an event, or the thread is to
    /// end.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.api.event.as_fd()
    }

    /// Makes [`Outbox::wake_fd`] unreadable until the next wake-up.
    pub(super) fn clear_wake(&self) {
        self.api.event.take();
    }

    /// Whether the thread is to end.
    pub(super) fn is_stopped(&self) -> bool {
        self.api.stop.load(Ordering::Acquire)
    }
}
