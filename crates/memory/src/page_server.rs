//! Memory that a page server fills in: another process that answers the guest's page faults through userfaultfd.
//!
//! # The handshake
//!
//! It is Firecracker's, so that its page servers work unchanged. The server listens on a Unix socket. The monitor maps anonymous
//! memory, registers it for missing pages, connects, and sends one message: a JSON array with an object for each region
//! (`base_host_virt_addr`, `size`, `offset` in the image, `page_size`, all in bytes, and `page_size_kib`, which is in bytes as
//! well, as it always was), and the userfaultfd as `SCM_RIGHTS`. From then on the server reads faults from the descriptor and
//! answers them with `UFFDIO_COPY`; where the guest's balloon gave pages back it reads `UFFD_EVENT_REMOVE`, and has to answer later
//! faults there with zeros. Nothing is sent back.
//!
//! # When the server fails
//!
//! The monitor keeps the descriptor as well. Without it, the server's death would close the last one, and the kernel would let
//! the guest go on *with zeros*. So a guest whose server is gone waits for its page, and [`PageServer`] reports it:
//!
//! - [`PageServer::probe`] before the guest runs: does the server answer faults?
//! - [`PageServer::wait_while_serving`] while vCPUs get their state, which KVM may need pages for.
//! - [`PageServer::wait`] from then on, from a thread of the caller's.
//!
//! Nothing in the handshake says which process serves. The process that called `listen` may fork the one that accepts and end itself, and a
//! server may close the connection and go on with the userfaultfd alone. So these are the signs of life, each of which is enough:
//!
//! 1. Somebody holds the other end of the connection.
//! 2. The process that listened lives.
//! 3. Somebody reads page faults.
//!
//! Where the first two are missing the server is an *orphan*, and the third decides: it is gone when a fault has been unread for the caller's
//! limit and no page has come in that time. A fault that was read before the reader ended would not show, so threads that wait are made to fault
//! again. Other servers only stall: they may recover.
//!
//! Threads that wait for a page can be killed but not interrupted, so nobody who has something else to do may wait for one: a thread
//! touches the pages, and the others wait for *it*, as long as there is progress ([`Connection::fetch`]). A machine whose server is gone
//! can only end, at best with its process. [`PageServer::release`] lets its threads go, with zeros, so that they can be joined: only where
//! no vCPU or device can go on with these zeros.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use config::HugePages;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use serde::Serialize;

use crate::backing::Backing;
use crate::image::Observer;
use crate::layout::MemoryLayout;
use crate::pages::{PAGE, PageSet};
use crate::ram::{GuestRam, MapError};
use crate::sys::peer;
use crate::sys::span::Span;
use crate::sys::span_io;
use crate::sys::userfault::Userfault;

/// How long who waits for pages waits before it looks at the server.
const TURN: Duration = Duration::from_millis(20);

/// How long a server may take to accept the connection and the message.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why memory cannot come from a page server.
#[derive(Debug, thiserror::Error)]
pub enum PageServerError {
    /// The kernel refused the mapping.
    #[error(transparent)]
    Map(#[from] MapError),
    /// No userfaultfd: not permitted, or not built into the kernel.
    #[error("cannot create a userfaultfd (it needs read access to /dev/userfaultfd, or CAP_SYS_PTRACE): {0}")]
    Userfault(io::Error),
    /// A region cannot be registered.
    #[error("cannot have {size} bytes of guest memory served by a page server: {source}")]
    Register {
        /// Length of the region in bytes.
        size: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Nobody listens, or nobody accepts within five seconds.
    #[error("cannot connect to the page server at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The connection broke before the server had the regions.
    #[error("cannot send the memory regions to the page server at {}: {source}", path.display())]
    Send {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The server had time enough to answer page faults.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A descriptor of the server's cannot be watched.
    #[error("cannot watch the page server at {}: {source}", path.display())]
    Watch {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Why pages did not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The server had time enough to answer a page fault.
    #[error("the page server at {} did not answer a page fault within {} ms", path.display(), waited.as_millis())]
    Unanswered {
        /// The socket.
        path: PathBuf,
        /// How long it had.
        waited: Duration,
    },
    /// The server is an orphan, and nobody reads page faults.
    #[error("the page server at {} is gone", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
    },
    /// The caller gave up waiting ([`Observer::cancelled`]).
    #[error("waiting for the page server at {} was cancelled", path.display())]
    Cancelled {
        /// The socket.
        path: PathBuf,
    },
    /// There is no thread to wait for pages.
    #[error("cannot start a thread for the page server at {}: {source}", path.display())]
    Thread {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// What became of a page server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerEvent {
    /// It closed the connection. It may go on serving: keep waiting.
    Closed,
    /// It has closed the connection, the process that listened has ended or cannot be seen, and nobody reads page faults. There are no more pages.
    Gone,
    /// Faults have been waiting unread for the whole of the time limit. It may come to itself: keep waiting, or give up.
    Stalled,
    /// The caller's own descriptor became readable.
    Stopped,
}

/// The monitor's side of a page server: who watches it has this.
#[derive(Debug)]
pub struct PageServer {
    ram: GuestRam,
    connection: Arc<Connection>,
    closed: bool,
}

/// What there is of the server here: shared by all that need its pages.
#[derive(Debug)]
pub(crate) struct Connection {
    path: PathBuf,
    userfault: Userfault,
    socket: OwnedFd,
    /// The process that listened, if it can be seen from here.
    process: Option<OwnedFd>,
}

/// One region in the message.
#[derive(Serialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

impl GuestRam {
    /// Maps memory of this layout and hands it to the page server that listens at `socket`.
    pub fn from_page_server(
        layout: &MemoryLayout,
        socket: &Path,
        huge_pages: HugePages,
        track_dirty_pages: bool,
    ) -> Result<(Self, PageServer), PageServerError> {
        let hugetlb = huge_pages == HugePages::Hugetlbfs2M;
        let userfault = Userfault::open(hugetlb).map_err(PageServerError::Userfault)?;
        let path = socket.to_path_buf();
        let connect =
            |e: rustix::io::Errno| PageServerError::Connect { path: path.clone(), source: e.into() };
        let socket = self::connect(socket).map_err(connect)?;
        let process = peer::process(socket.as_fd());
        let connection = Arc::new(Connection { path, userfault, socket, process });
        let backing = Backing::PageServer(Arc::clone(&connection));
        let ram = Self::build(layout.clone(), huge_pages, track_dirty_pages, backing)?;
        for span in ram.spans() {
            let size = span.len();
            let register = connection.userfault.register(*span);
            register.map_err(|source| PageServerError::Register { size, source })?;
        }
        let server = PageServer { ram: ram.clone(), connection, closed: false };
        server.send_regions()?;
        Ok((ram, server))
    }
}

/// Connects, but not for longer than a server that lives needs.
fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIMEOUT))?;
    rustix::net::connect(&socket, &address).map_err(|e| match e {
        // What the kernel calls a full backlog that nobody empties in time.
        rustix::io::Errno::AGAIN => rustix::io::Errno::TIMEDOUT,
        e => e,
    })?;
    Ok(socket)
}

impl PageServer {
    fn send_regions(&self) -> Result<(), PageServerError> {
        let page_size = self.ram.page_size();
        let regions: Vec<_> = self
            .ram
            .layout()
            .regions()
            .iter()
            .zip(self.ram.spans())
            .map(|(region, span)| Region {
                base_host_virt_addr: span.addr(),
                size: region.size,
                offset: region.offset,
                page_size,
                page_size_kib: page_size,
            })
            .collect();
        let message = serde_json::to_vec(&regions).expect("numbers have a form in JSON");
        let Connection { path, userfault, socket, .. } = &*self.connection;
        let failed = |source| PageServerError::Send { path: path.clone(), source };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [userfault.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "there is space for one descriptor");
        let sent =
            rustix::net::sendmsg(socket, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)
                .map_err(|e| failed(e.into()))?;
        // 64 regions are 10 KiB, far below a socket's buffer: it goes at once or not at all.
        if sent == message.len() { Ok(()) } else { Err(failed(io::ErrorKind::WriteZero.into())) }
    }

    /// Touches the pages at these guest addresses, and the guest's first, which makes the server
    /// answer faults, for at most `limit` each, or until `observer` is cancelled. On an error the
    /// memory is released and of no use any more.
    pub fn probe(
        &self,
        addresses: &[u64],
        limit: Duration,
        observer: &dyn Observer,
    ) -> Result<(), PageServerError> {
        let mut pages = self.ram.empty_page_set();
        pages.insert(0, 0..1);
        for (index, region) in self.ram.regions().iter().enumerate() {
            for address in addresses.iter().filter_map(|address| address.checked_sub(region.guest_addr)) {
                pages.insert(index, address / PAGE..address / PAGE + 1);
            }
        }
        let fetched = self.connection.fetch(&self.ram, &pages, limit, observer);
        if fetched.is_err() {
            self.release();
        }
        Ok(fetched?)
    }

    /// Waits for other threads that need pages: calls `is_done` until it returns true. It may block
    /// for the time that it is given. An error if it returns one, if the server is gone, or if no
    /// page has arrived for `patience`.
    pub fn wait_while_serving<E: From<FetchError>>(
        &self,
        patience: Duration,
        is_done: impl FnMut(Duration) -> Result<bool, E>,
    ) -> Result<(), E> {
        self.connection.wait_while_serving(&self.ram, patience, || self.ram.page_progress(), is_done)
    }

    /// Waits until something happened to the server, or until `stop` is readable. A fault that is unread for `stall` is an
    /// event as well. Call it again after [`ServerEvent::Closed`] and [`ServerEvent::Stalled`].
    pub fn wait(&mut self, stop: BorrowedFd<'_>, stall: Duration) -> Result<ServerEvent, PageServerError> {
        let watched = |e: rustix::io::Errno| PageServerError::Watch {
            path: self.connection.path.clone(),
            source: e.into(),
        };
        let turn = (stall / 10).max(Duration::from_millis(1));
        let mut reads = FaultReads::new(stall);
        loop {
            let orphaned = self.connection.is_orphaned();
            if reads.look(&self.connection, &self.ram, orphaned).map_err(watched)? {
                return Ok(if orphaned { ServerEvent::Gone } else { ServerEvent::Stalled });
            }
            let mut fds = vec![(stop, PollFlags::IN)];
            if !self.closed {
                fds.push((self.connection.socket.as_fd(), PollFlags::RDHUP));
            }
            let ready = poll_fds(&fds, turn).map_err(watched)?;
            if !ready[0].is_empty() {
                return Ok(ServerEvent::Stopped);
            }
            if ready.get(1).is_some_and(|ready| !ready.is_empty()) {
                self.closed = true;
                return Ok(ServerEvent::Closed);
            }
        }
    }

    /// Whether it has closed the connection and the process that listened has ended or cannot be seen. A process that kept the userfaultfd may
    /// serve it all the same.
    pub fn is_orphaned(&self) -> bool {
        self.connection.is_orphaned()
    }

    /// Lets all threads go that wait for a page: missing pages are zero from now on. For a machine that is not to run.
    pub fn release(&self) {
        for span in self.ram.spans() {
            self.connection.release(*span);
        }
    }
}

/// Whether somebody reads page faults.
#[derive(Debug)]
struct FaultReads {
    /// How long a fault may stay unread while no page comes.
    limit: Duration,
    /// Since when each look found an unread fault, and how many pages there were then. Faults come and go: it need not be the same fault.
    unread: Option<(Instant, u64)>,
    /// When no fault was unread, and how many pages there were then.
    quiet: Option<(Instant, u64)>,
}

impl FaultReads {
    fn new(limit: Duration) -> Self {
        FaultReads { limit, unread: None, quiet: None }
    }

    /// Looks once; call it several times within the limit. Whether a fault has been unread for the limit, and no page has come in that time.
    /// With `orphaned`, faults that were read and not answered count as unread.
    fn look(&mut self, connection: &Connection, ram: &GuestRam, orphaned: bool) -> rustix::io::Result<bool> {
        let pages = || ram.page_progress();
        let ready = poll_fds(&[(connection.userfault.as_fd(), PollFlags::IN)], Duration::ZERO)?;
        if !ready[0].is_empty() {
            self.quiet = None;
            match self.unread {
                None => self.unread = Some((Instant::now(), pages())),
                Some((since, before)) if since.elapsed() >= self.limit => {
                    let here = pages();
                    if here == before {
                        return Ok(true);
                    }
                    // Busy, not stalled: there is always a fault waiting, not always the same.
                    self.unread = Some((Instant::now(), here));
                }
                Some(_) => {}
            }
            return Ok(false);
        }
        self.unread = None;
        match self.quiet {
            _ if !orphaned => {}
            None => self.quiet = Some((Instant::now(), pages())),
            Some((since, before)) if since.elapsed() >= self.limit / 5 => {
                let here = pages();
                if here == before {
                    // A server that is only slow reads the same fault twice, as when two vCPUs come to one page.
                    ram.spans().iter().for_each(|span| connection.fault_again(*span));
                }
                self.quiet = Some((Instant::now(), here));
            }
            Some(_) => {}
        }
        Ok(false)
    }
}

impl Connection {
    /// Has the server send those of `pages` that are not there. Where it sends nothing more for `patience`, it is not waited for any longer; what
    /// waits for it then is a thread that does nothing else.
    pub(crate) fn fetch(
        &self,
        ram: &GuestRam,
        pages: &PageSet,
        patience: Duration,
        observer: &dyn Observer,
    ) -> Result<(), FetchError> {
        let touched = Arc::new(AtomicU64::new(0));
        let given_up = Arc::new(AtomicBool::new(false));
        let (done, is_done) = sync_channel(1);
        let toucher = {
            let (ram, pages) = (ram.clone(), pages.clone());
            let (touched, given_up) = (Arc::clone(&touched), Arc::clone(&given_up));
            move || {
                for (index, span) in ram.spans().iter().enumerate() {
                    for page in pages.runs(index).flatten() {
                        if given_up.load(Ordering::Relaxed) {
                            return;
                        }
                        span_io::touch(span.subspan(page * PAGE..(page + 1) * PAGE));
                        touched.fetch_add(1, Ordering::Relaxed);
                    }
                }
                // Nobody to tell: given up.
                let _ = done.send(());
            }
        };
        let thread = std::thread::Builder::new().name("page_fetch".into()).spawn(toucher);
        thread.map_err(|source| FetchError::Thread { path: self.path.clone(), source })?;
        let waited = self.wait_while_serving(
            ram,
            patience,
            || touched.load(Ordering::Relaxed),
            |turn| {
                if observer.cancelled() {
                    return Err(FetchError::Cancelled { path: self.path.clone() });
                }
                match is_done.recv_timeout(turn) {
                    Ok(()) => Ok(true),
                    Err(RecvTimeoutError::Timeout) => Ok(false),
                    // It ends without a word only if it panics.
                    Err(RecvTimeoutError::Disconnected) => Err(FetchError::Gone { path: self.path.clone() }),
                }
            },
        );
        given_up.store(waited.is_err(), Ordering::Relaxed);
        waited
    }

    /// Calls `is_done` until it returns true, while the server lives and `progress` changes at
    /// least once within `patience`.
    fn wait_while_serving<E: From<FetchError>>(
        &self,
        ram: &GuestRam,
        patience: Duration,
        progress: impl Fn() -> u64,
        mut is_done: impl FnMut(Duration) -> Result<bool, E>,
    ) -> Result<(), E> {
        // Progress may be expensive to ask for; a server that dies is noticed sooner.
        let look_every = patience / 10;
        let turn = TURN.min(look_every);
        let (mut progressed, mut looked) = (Instant::now(), Instant::now());
        let mut last = None;
        let mut reads = FaultReads::new(patience / 2);
        while !is_done(turn)? {
            // A server whose state cannot be seen is waited for, as long as there is patience.
            if self.is_orphaned() && reads.look(self, ram, true).unwrap_or(false) {
                return Err(FetchError::Gone { path: self.path.clone() }.into());
            }
            if looked.elapsed() >= look_every {
                let now = Some(progress());
                if last.is_some() && last != now {
                    progressed = Instant::now();
                }
                (last, looked) = (now, Instant::now());
            }
            if progressed.elapsed() >= patience {
                return Err(FetchError::Unanswered { path: self.path.clone(), waited: patience }.into());
            }
        }
        Ok(())
    }

    /// Lets threads go that wait for a page of `span`: its missing pages are zero from now on.
    pub(crate) fn release(&self, span: Span) {
        // Of a span that is not registered there is nothing to release.
        let _ = self.userfault.unregister(span);
    }

    /// Lets threads that wait for a page of `span` fault again.
    fn fault_again(&self, span: Span) {
        // Of a span that was released there is nothing to wait for.
        let _ = self.userfault.fault_again(span);
    }

    /// See [`PageServer::is_orphaned`].
    fn is_orphaned(&self) -> bool {
        let happened =
            |fd, flags| poll_fds(&[(fd, flags)], Duration::ZERO).is_ok_and(|ready| !ready[0].is_empty());
        happened(self.socket.as_fd(), PollFlags::RDHUP)
            && self.process.as_ref().is_none_or(|process| happened(process.as_fd(), PollFlags::IN))
    }
}

fn poll_fds(fds: &[(BorrowedFd<'_>, PollFlags)], timeout: Duration) -> rustix::io::Result<Vec<PollFlags>> {
    let mut polled: Vec<_> = fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    let timeout =
        Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: i64::from(timeout.subsec_nanos()) };
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(polled.iter().map(PollFd::revents).collect()),
        Err(e) => Err(e),
    }
}
