//! Memory from a page server: the handshake as servers for Firecracker know it, and servers that fail.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use config::HugePages;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;
use vesta_memory::image::ImageError;
use vesta_memory::page_server::{FetchError, PageServer, PageServerError, ServerEvent};
use vesta_memory::pages::PAGE;
use vesta_memory::{ForkError, GuestRam, MemoryLayout};
use vm_memory::{Bytes, GuestAddress};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(100);

/// What the message says of a region. No other field is expected.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

/// A server of our own, in the way that they are written for Firecracker.
struct Handler {
    socket: UnixStream,
    userfault: OwnedFd,
    regions: Vec<Region>,
}

/// `struct uffd_msg`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    args: [u64; 3],
}

const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_EVENT_REMOVE: u8 = 0x15;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;

impl Handler {
    fn accept(listener: &UnixListener) -> Self {
        let (socket, _) = listener.accept().unwrap();
        let mut bytes = vec![0; 64 << 10];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [std::io::IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&socket, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        let RecvAncillaryMessage::ScmRights(mut fds) = ancillary.drain().next().unwrap() else { panic!() };
        let userfault = fds.next().unwrap();
        let regions = serde_json::from_slice(&bytes[..got.bytes]).unwrap();
        Handler { socket, userfault, regions }
    }

    /// The next event: its kind, and its first and second number. None when the monitor has closed its descriptor.
    fn event(&self) -> Message {
        loop {
            let mut polled = [rustix::event::PollFd::new(&self.userfault, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut polled, None).unwrap();
            let mut message = Message::default();
            // SAFETY: the buffer is one message.
            let n = unsafe {
                libc::read(self.userfault.as_raw_fd(), (&raw mut message).cast(), size_of::<Message>())
            };
            if n == size_of::<Message>().cast_signed() {
                return message;
            }
        }
    }

    /// Answers a fault with a page of `byte`.
    fn copy(&self, address: u64, byte: u8) {
        let page = [byte; PAGE as usize];
        let mut copy = [address & !(PAGE - 1), page.as_ptr() as u64, PAGE, 0, 0];
        // SAFETY: the structure is five numbers; the page is alive.
        let done = unsafe { libc::ioctl(self.userfault.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Serves a page fault with a byte that depends on the offset in the image: its page's number, and one.
    fn serve(&self, fault: &Message) {
        assert_eq!(fault.event, UFFD_EVENT_PAGEFAULT);
        let address = fault.args[1];
        let region = self
            .regions
            .iter()
            .find(|r| (r.base_host_virt_addr..r.base_host_virt_addr + r.size).contains(&address))
            .unwrap();
        let offset = region.offset + address - region.base_host_virt_addr;
        self.copy(address, (offset / PAGE % 251) as u8 + 1);
    }
}

fn listen() -> (tempfile::TempDir, PathBuf, UnixListener) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("uffd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    (dir, path, listener)
}

fn connect(mib: u32, path: &Path) -> (GuestRam, PageServer) {
    GuestRam::from_page_server(&MemoryLayout::of_size(mib), path, HugePages::None, false).unwrap()
}

fn byte(ram: &GuestRam, page: u64) -> u8 {
    ram.memory().read_obj(GuestAddress(page * PAGE)).unwrap()
}

/// A pipe: nobody stops, as long as the writing end is there.
fn no_stop() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

#[test]
fn server_gets_all_regions_and_serves_their_faults() {
    let (_dir, path, listener) = listen();
    let server = std::thread::spawn(move || {
        let handler = Handler::accept(&listener);
        (0..3).for_each(|_| handler.serve(&handler.event()));
        handler
    });
    let (ram, client) = connect(3 * 1024 + 2, &path);
    client.probe(&[], LONG, &()).unwrap();
    assert_eq!(byte(&ram, 5), 6);
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), ((3 << 18) % 251) as u8 + 1);
    let handler = server.join().unwrap();
    for (region, mapped) in handler.regions.iter().zip(ram.regions()) {
        assert_eq!((region.base_host_virt_addr, region.size), (mapped.host_addr, mapped.size));
        assert_eq!((region.page_size, region.page_size_kib), (PAGE, PAGE));
    }
    assert_eq!(handler.regions.iter().map(|r| r.offset).collect::<Vec<_>>(), [0, 3 << 30]);
    assert_eq!(ram.fork_check(), Err(ForkError::PageServer));
}

#[test]
fn server_gets_remove_events_for_discarded_pages() {
    let (_dir, path, listener) = listen();
    let server = std::thread::spawn(move || {
        let handler = Handler::accept(&listener);
        handler.serve(&handler.event());
        let removed = handler.event();
        let fault = handler.event();
        handler.copy(fault.args[1], 0);
        (removed.event, removed.args)
    });
    let (ram, _client) = connect(1, &path);
    assert_eq!(byte(&ram, 3), 4);
    ram.discard(3 * PAGE, 2 * PAGE).unwrap();
    assert_eq!(byte(&ram, 3), 0);
    let start = ram.regions()[0].host_addr + 3 * PAGE;
    let (event, args) = server.join().unwrap();
    assert_eq!((event, args[0], args[1]), (UFFD_EVENT_REMOVE, start, start + 2 * PAGE));
}

#[test]
fn image_of_served_memory_has_all_pages() {
    let (dir, path, listener) = listen();
    std::thread::spawn(move || {
        let handler = Handler::accept(&listener);
        (0..256).for_each(|_| handler.serve(&handler.event()));
        handler.socket.shutdown(std::net::Shutdown::Both).unwrap();
    });
    let (ram, _client) = connect(1, &path);
    let image = dir.path().join("mem");
    vesta_memory::image::write_full(&ram, &image, &()).unwrap().file.commit().unwrap();
    let bytes = std::fs::read(&image).unwrap();
    assert!((0..256).all(|page| bytes[page * 4096] == (page % 251) as u8 + 1));
}

#[test]
fn image_fails_and_leaves_no_file_if_its_server_dies() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("uffd.sock");
    let mut child = server_process_at(&path);
    let (ram, client) = connect(1, &path);
    client.probe(&[], LONG, &()).unwrap();
    let image = dir.path().join("mem");
    let target = image.clone();
    let written = std::thread::spawn(move || vesta_memory::image::write_full(&ram, &target, &()).map(drop));
    // It is in the middle of it.
    wait_for(&mut child, "fault read");
    child.kill().unwrap();
    child.wait().unwrap();
    let error = written.join().unwrap().unwrap_err();
    assert!(matches!(error, ImageError::Fetch(FetchError::Gone { .. })), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the socket is there");
    client.release();
}

#[test]
fn probe_fetches_the_given_pages() {
    let (_dir, path, listener) = listen();
    let server = std::thread::spawn(move || {
        let handler = Handler::accept(&listener);
        (0..3).for_each(|_| handler.serve(&handler.event()));
    });
    let (ram, client) = connect(1, &path);
    client.probe(&[5 * PAGE + 1, 9 * PAGE, 1 << 40], LONG, &()).unwrap();
    server.join().unwrap();
    assert_eq!((byte(&ram, 5), byte(&ram, 9)), (6, 10));
}

#[test]
fn connect_error_names_the_socket() {
    let layout = MemoryLayout::of_size(1);
    let error =
        GuestRam::from_page_server(&layout, Path::new("/no/sock"), HugePages::None, false).unwrap_err();
    assert!(error.to_string().starts_with("page server /no/sock: cannot connect: No such file"), "{error}");
}

#[test]
fn probe_times_out_if_the_server_never_answers() {
    let (_dir, path, listener) = listen();
    let (ram, client) = connect(1, &path);
    let _handler = Handler::accept(&listener);
    let error = client.probe(&[], SHORT, &()).unwrap_err();
    assert!(matches!(error, PageServerError::Fetch(FetchError::Unanswered { .. })), "{error}");
    assert!(error.to_string().ends_with("did not answer a page fault within 100 ms"), "{error}");
    drop((client, ram));
}

#[test]
fn wait_reports_a_closed_connection_and_then_the_stop() {
    let (_dir, path, listener) = listen();
    let (_ram, mut client) = connect(1, &path);
    drop(Handler::accept(&listener));
    let (read, write) = no_stop();
    assert_eq!(client.wait(read.as_fd(), LONG).unwrap(), ServerEvent::Closed);
    drop(write);
    assert_eq!(client.wait(read.as_fd(), LONG).unwrap(), ServerEvent::Stopped);
    assert!(!client.is_orphaned(), "this process listened, and is here");
}

#[test]
fn wait_reports_a_stall_and_release_unblocks_threads() {
    let (_dir, path, listener) = listen();
    let (ram, mut client) = connect(1, &path);
    let _handler = Handler::accept(&listener);
    let guest = std::thread::spawn(move || byte(&ram, 9));
    let (read, _write) = no_stop();
    assert_eq!(client.wait(read.as_fd(), SHORT).unwrap(), ServerEvent::Stalled);
    assert!(!guest.is_finished(), "a fault was answered by nobody");
    client.release();
    assert_eq!(guest.join().unwrap(), 0);
}

/// Not a test: the process of a server that another test starts. It serves one fault, then reads one more and waits.
#[test]
fn server_process() {
    let Some(path) = std::env::var_os("VESTA_TEST_PAGE_SERVER") else { return };
    let listener = UnixListener::bind(path).unwrap();
    println!("listening");
    let handler = Handler::accept(&listener);
    handler.serve(&handler.event());
    handler.event();
    println!("fault read");
    std::thread::park();
}

fn server_process_at(path: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "server_process", "--nocapture"])
        .env("VESTA_TEST_PAGE_SERVER", path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(&mut child, "listening");
    child
}

fn wait_for(child: &mut Child, text: &str) {
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.contains(text) {
        assert_eq!(child.stdout.as_mut().unwrap().read(&mut byte).unwrap(), 1, "ended after {seen:?}");
        seen.push(char::from(byte[0]));
    }
}

#[test]
fn guest_of_a_dead_server_does_not_continue_with_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("uffd.sock");
    let mut child = server_process_at(&path);
    let (ram, mut client) = connect(1, &path);
    client.probe(&[], LONG, &()).unwrap();
    let guest = std::thread::spawn(move || byte(&ram, 7));
    // The fault is not among the unread ones any more.
    wait_for(&mut child, "fault read");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(end_of(&mut client), ServerEvent::Gone);
    assert!(client.is_orphaned());
    assert!(!guest.is_finished(), "the guest went on without its page");
    client.release();
    guest.join().unwrap();
}

/// What the wait reports once the server has closed its connection.
fn end_of(client: &mut PageServer) -> ServerEvent {
    let (read, _write) = no_stop();
    loop {
        let event = client.wait(read.as_fd(), SHORT).unwrap();
        if event != ServerEvent::Closed {
            return event;
        }
    }
}

#[test]
fn probe_fails_if_the_server_dies_before_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("uffd.sock");
    let mut child = server_process_at(&path);
    let (_ram, client) = connect(1, &path);
    child.kill().unwrap();
    child.wait().unwrap();
    // Alive, it might have answered; killed before the probe began, it cannot.
    let error = client.probe(&[], Duration::from_secs(2), &()).unwrap_err();
    assert!(matches!(error, PageServerError::Fetch(FetchError::Gone { .. })), "{error}");
}

/// Not a test: the process that listens, in the tests of servers that fork. It starts the process that serves, and ends when it is told to.
#[test]
fn listening_process() {
    let Some(path) = std::env::var_os("VESTA_TEST_FORKING_SERVER") else { return };
    let listener = UnixListener::bind(path).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let mut server = test_process("serving_process");
    server.env("VESTA_TEST_LISTENER", listener.as_raw_fd().to_string());
    #[expect(clippy::zombie_processes, reason = "it outlives this process")]
    server.stdin(Stdio::inherit()).stdout(Stdio::inherit()).spawn().unwrap();
    let mut byte = [0];
    std::io::stdin().read_exact(&mut byte).unwrap();
}

/// Not a test: the process that serves. It ends when its standard input does.
#[test]
fn serving_process() {
    let Some(fd) = std::env::var_os("VESTA_TEST_LISTENER") else { return };
    let fd = fd.to_str().unwrap().parse().unwrap();
    // SAFETY: the descriptor was inherited for this process, and nothing else here owns it.
    let listener = unsafe { UnixListener::from_raw_fd(fd) };
    println!("listening");
    let handler = Handler::accept(&listener);
    if std::env::var_os("VESTA_TEST_CLOSES").is_some() {
        handler.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }
    loop {
        let (input, flags) = (std::io::stdin(), rustix::event::PollFlags::IN);
        let mut polled = [
            rustix::event::PollFd::new(&handler.userfault, flags),
            // Only its end: what is written is for the process that listened.
            rustix::event::PollFd::new(&input, rustix::event::PollFlags::empty()),
        ];
        rustix::event::poll(&mut polled, None).unwrap();
        if polled[0].revents().contains(flags) {
            handler.serve(&handler.event());
        }
        if !polled[1].revents().is_empty() {
            return;
        }
    }
}

fn test_process(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]);
    command
}

/// A server whose listening process has ended.
struct Forked {
    input: ChildStdin,
    output: ChildStdout,
}

impl Forked {
    /// Ends it, and waits until it has ended.
    fn end(mut self) {
        drop(self.input);
        self.output.read_to_end(&mut Vec::new()).unwrap();
    }
}

/// Connects to a server whose listening process then ends. `closes`: the server keeps only the userfaultfd.
fn connect_to_forked(closes: bool) -> (GuestRam, PageServer, Forked) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("uffd.sock");
    let mut command = test_process("listening_process");
    command.env("VESTA_TEST_FORKING_SERVER", &path).stdin(Stdio::piped()).stdout(Stdio::piped());
    if closes {
        command.env("VESTA_TEST_CLOSES", "1");
    }
    let mut listening = command.spawn().unwrap();
    wait_for(&mut listening, "listening");
    let (ram, client) = connect(1, &path);
    client.probe(&[], LONG, &()).unwrap();
    let mut input = listening.stdin.take().unwrap();
    input.write_all(b"x").unwrap();
    listening.wait().unwrap();
    (ram, client, Forked { input, output: listening.stdout.take().unwrap() })
}

/// Whether the server still serves, and the wait reports nothing while it does.
fn assert_serves(ram: &GuestRam, client: &mut PageServer) {
    let (read, write) = no_stop();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| client.wait(read.as_fd(), LONG).unwrap());
        for page in 100..120 {
            assert_eq!(byte(ram, page), page as u8 + 1);
        }
        drop(write);
        assert_eq!(waits.join().unwrap(), ServerEvent::Stopped);
    });
}

#[test]
fn forked_server_outlives_the_process_that_listened() {
    let (ram, mut client, server) = connect_to_forked(false);
    assert_serves(&ram, &mut client);
    assert!(!client.is_orphaned(), "its end of the connection is open");
    server.end();
    let guest = std::thread::spawn(move || byte(&ram, 7));
    assert_eq!(end_of(&mut client), ServerEvent::Gone);
    assert!(!guest.is_finished(), "the guest went on without its page");
    client.release();
    guest.join().unwrap();
}

#[test]
fn server_that_keeps_only_the_userfaultfd_is_alive() {
    let (ram, mut client, server) = connect_to_forked(true);
    let (read, _write) = no_stop();
    assert_eq!(client.wait(read.as_fd(), LONG).unwrap(), ServerEvent::Closed);
    assert!(client.is_orphaned());
    assert_serves(&ram, &mut client);
    client.probe(&[5 * PAGE, 9 * PAGE], LONG, &()).unwrap();
    server.end();
    let guest = std::thread::spawn(move || byte(&ram, 7));
    assert_eq!(end_of(&mut client), ServerEvent::Gone);
    assert!(!guest.is_finished(), "the guest went on without its page");
    client.release();
    guest.join().unwrap();
}
