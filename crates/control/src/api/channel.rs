//! Between the API thread and the main thread: commands one way, answers the other.
//!
//! Each way is a queue and an eventfd that wakes its reader. The queue of commands is bounded by the number of
//! connections: each has at most one command out.

use std::{
    cell::RefCell,
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};

use super::socket::SocketFile;
use crate::{Command, CommandError, Reply};

/// The main thread's end: the commands that clients sent, in the order in which they arrived.
///
/// Poll its descriptor for reading: it is readable exactly as long as [`Requests::try_recv`] has something to give.
/// Dropping it ends the API thread, which refuses what was not answered, and removes the socket file.
#[derive(Debug)]
pub struct Requests {
    inbox: mpsc::Receiver<Request>,
    /// Requests that were taken and put back; they come before those in `inbox`.
    put_back: RefCell<VecDeque<Request>>,
    /// Counts what is in `put_back` and `inbox`.
    arrived: Arc<OwnedFd>,
    api: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
    socket_file: Option<SocketFile>,
}

/// A command from a client that waits for the answer.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Where the answer goes.
    pub reply_to: ReplyTo,
}

/// The way back to the client. Dropped without an answer, it tells the client that there is none.
#[derive(Debug)]
pub struct ReplyTo {
    slot: usize,
    answers: mpsc::Sender<Answer>,
    api: Arc<Bell>,
    answered: bool,
}

/// What the API thread gets back.
#[derive(Debug)]
pub(super) struct Answer {
    /// Which connection asked.
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
    api: Arc<Bell>,
}

/// What wakes the API thread, and tells it when to end.
#[derive(Debug)]
struct Bell {
    wake: OwnedFd,
    stop: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        // It can fail only by a counter that is at its limit: then the thread is awake as it is.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// Both ends, with no thread between them yet.
pub(super) fn channel(socket_file: SocketFile) -> Result<(Requests, Outbox), Errno> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let arrived = Arc::new(eventfd(0, flags | EventfdFlags::SEMAPHORE)?);
    let api = Arc::new(Bell { wake: eventfd(0, flags)?, stop: AtomicBool::new(false) });
    let (commands, inbox) = mpsc::channel();
    let (to_answer, answers) = mpsc::channel();
    let outbox =
        Outbox { commands, arrived: Arc::clone(&arrived), answers, to_answer, api: Arc::clone(&api) };
    let put_back = RefCell::default();
    Ok((Requests { inbox, put_back, arrived, api, thread: None, socket_file: Some(socket_file) }, outbox))
}

impl Requests {
    /// The thread to wait for at the end.
    pub(super) fn set_thread(&mut self, thread: JoinHandle<()>) {
        self.thread = Some(thread);
    }

    /// The next request, if there is one. Never waits.
    pub fn try_recv(&self) -> Option<Request> {
        // One count is one request, and the request went in first.
        let mut count = [0; 8];
        rustix::io::read(&*self.arrived, &mut count).ok()?;
        let first = self.put_back.borrow_mut().pop_front();
        first.or_else(|| self.inbox.try_recv().ok())
    }

    /// Puts requests back that came from [`Self::try_recv`] and have to wait: they are the next
    /// ones, in this order.
    pub fn put_back(&self, requests: Vec<Request>) {
        let count = requests.len() as u64;
        if count == 0 {
            return;
        }
        let mut waiting = self.put_back.borrow_mut();
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
        // First nobody new; then the thread, which sends out the last answers and refuses the rest.
        self.socket_file = None;
        self.api.stop.store(true, Ordering::Release);
        self.api.ring();
        if let Some(thread) = self.thread.take() {
            // It panicked if this fails, and has said so.
            let _ = thread.join();
        }
    }
}

impl ReplyTo {
    /// Answers the client. It never waits, and the client may be gone.
    pub fn send(mut self, result: Result<Reply, CommandError>) {
        self.answer(result);
    }

    fn answer(&mut self, result: Result<Reply, CommandError>) {
        self.answered = true;
        // It fails only when the API thread has ended, and the connection with it.
        if self.answers.send(Answer { slot: self.slot, result }).is_ok() {
            self.api.ring();
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
    /// Sends `command` to the main thread. The answer comes under `slot`, always.
    pub(super) fn send(&self, slot: usize, command: Command) {
        let reply_to =
            ReplyTo { slot, answers: self.to_answer.clone(), api: Arc::clone(&self.api), answered: false };
        // If nobody is there to take it, dropping it answers it.
        if self.commands.send(Request { command, reply_to }).is_ok() {
            let written = rustix::io::write(&*self.arrived, &1_u64.to_ne_bytes());
            debug_assert!(written.is_ok(), "at most one count per connection");
        }
    }

    /// The next answer, if there is one.
    pub(super) fn try_recv(&self) -> Option<Answer> {
        self.answers.try_recv().ok()
    }

    /// What is readable when there may be an answer, or the thread is to end.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.api.wake.as_fd()
    }

    /// Makes [`Outbox::wake_fd`] quiet until the next ring.
    pub(super) fn hush(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.api.wake, &mut count);
    }

    /// Whether the thread is to end.
    pub(super) fn is_stopped(&self) -> bool {
        self.api.stop.load(Ordering::Acquire)
    }
}
