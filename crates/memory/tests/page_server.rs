//! Memory from a page server: the handshake as in Firecracker, and servers that fail.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
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

/// One region in the message. It has no other field.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

/// A page server as they are written for Firecracker, after its handshake.
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

    /// Waits for the next event.
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
        // SAFETY: the structure is five numbers, and the page outlives the call.
        let done = unsafe { libc::ioctl(self.userfault.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Answers a page fault with [`page_byte`] of its page of the image.
    fn serve(&self, fault: &Message) {
        assert_eq!(fault.event, UFFD_EVENT_PAGEFAULT);
        let address = fault.args[1];
        let region = self
            .regions
            .iter()
            .find(|r| (r.base_host_virt_addr..r.base_host_virt_addr + r.size).contains(&address))
            .unwrap();
        let offset = region.offset + address - region.base_host_virt_addr;
        self.copy(address, page_byte(offset / PAGE));
    }

    /// Serves the next `count` faults.
    fn serve_next(&self, count: usize) {
        (0..count).for_each(|_| self.serve(&self.event()));
    }
}

/// The byte of a page of the image that the server sends.
fn page_byte(page: u64) -> u8 {
    (page % 251) as u8 + 1
}

/// The path of a server's socket, in a directory of its own.
fn socket_path() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("uffd.sock");
    (dir, path)
}

fn connect(mib: u32, path: &Path) -> (GuestRam, PageServer) {
    GuestRam::from_page_server(&MemoryLayout::of_size(mib), path, HugePages::None, false).unwrap()
}

/// Connects a guest of `mib` mebibytes to a server on a thread, which runs `serve`.
fn serve_on_thread<T: Send + 'static>(
    mib: u32,
    serve: impl FnOnce(Handler) -> T + Send + 'static,
) -> (GuestRam, PageServer, JoinHandle<T>) {
    let (_dir, path) = socket_path();
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || serve(Handler::accept(&listener)));
    let (ram, client) = connect(mib, &path);
    (ram, client, server)
}

/// Connects a guest of 1 MiB to a server that answers nothing by itself.
fn silent_server() -> (GuestRam, PageServer, Handler) {
    let (ram, client, handler) = serve_on_thread(1, |handler| handler);
    (ram, client, handler.join().unwrap())
}

/// Connects a guest of 1 MiB to [`server_process`] at `path`.
fn connect_to_process(path: &Path) -> (GuestRam, PageServer, Child) {
    let child = start_process(test_process("server_process").env("VESTA_TEST_PAGE_SERVER", path));
    let (ram, client) = connect(1, path);
    (ram, client, child)
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn byte(ram: &GuestRam, page: u64) -> u8 {
    ram.memory().read_obj(GuestAddress(page * PAGE)).unwrap()
}

/// A pipe whose reading end stops the wait when the writing end is dropped.
fn stop_pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

#[test]
fn server_gets_all_regions_and_serves_their_faults() {
    let (ram, client, server) = serve_on_thread(3 * 1024 + 2, |handler| {
        handler.serve_next(3);
        handler
    });
    client.probe(&[], LONG, &()).unwrap();
    assert_eq!(byte(&ram, 5), page_byte(5));
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), page_byte(3 << 18));
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
    let (ram, _client, server) = serve_on_thread(1, |handler| {
        handler.serve_next(1);
        let removed = handler.event();
        let fault = handler.event();
        handler.copy(fault.args[1], 0);
        (removed.event, removed.args)
    });
    assert_eq!(byte(&ram, 3), page_byte(3));
    ram.discard(3 * PAGE, 2 * PAGE).unwrap();
    assert_eq!(byte(&ram, 3), 0);
    let start = ram.regions()[0].host_addr + 3 * PAGE;
    let (event, args) = server.join().unwrap();
    assert_eq!((event, args[0], args[1]), (UFFD_EVENT_REMOVE, start, start + 2 * PAGE));
}

#[test]
fn image_of_served_memory_has_all_pages() {
    let (ram, _client, _server) = serve_on_thread(1, |handler| {
        handler.serve_next(256);
        handler.socket.shutdown(std::net::Shutdown::Both).unwrap();
    });
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("mem");
    vesta_memory::image::write_full(&ram, &image, &()).unwrap().file.commit().unwrap();
    let bytes = std::fs::read(&image).unwrap();
    assert!((0..256).all(|page| bytes[(page * PAGE) as usize] == page_byte(page)));
}

#[test]
fn image_fails_and_leaves_no_file_if_its_server_dies() {
    let (dir, path) = socket_path();
    let (ram, client, mut child) = connect_to_process(&path);
    client.probe(&[], LONG, &()).unwrap();
    let image = dir.path().join("mem");
    let target = image.clone();
    let written = std::thread::spawn(move || vesta_memory::image::write_full(&ram, &target, &()).map(drop));
    // The image is partly written when this fault is read.
    wait_for(&mut child, "fault read");
    kill(child);
    let error = written.join().unwrap().unwrap_err();
    assert!(matches!(error, ImageError::Fetch(FetchError::Gone { .. })), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the socket is there");
    client.release();
}

#[test]
fn probe_fetches_the_given_pages() {
    let (ram, client, server) = serve_on_thread(1, |handler| handler.serve_next(3));
    client.probe(&[5 * PAGE + 1, 9 * PAGE, 1 << 40], LONG, &()).unwrap();
    server.join().unwrap();
    assert_eq!((byte(&ram, 5), byte(&ram, 9)), (page_byte(5), page_byte(9)));
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
    let (ram, client, _handler) = silent_server();
    let error = client.probe(&[], SHORT, &()).unwrap_err();
    assert!(matches!(error, PageServerError::Fetch(FetchError::Unanswered { .. })), "{error}");
    assert!(error.to_string().ends_with("did not answer a page fault within 100 ms"), "{error}");
    drop((client, ram));
}

#[test]
fn wait_reports_a_closed_connection_and_then_the_stop() {
    let (_ram, mut client, handler) = silent_server();
    drop(handler);
    let (read, write) = stop_pipe();
    assert_eq!(client.wait(read.as_fd(), LONG).unwrap(), ServerEvent::Closed);
    drop(write);
    assert_eq!(client.wait(read.as_fd(), LONG).unwrap(), ServerEvent::Stopped);
    assert!(!client.is_orphaned(), "this process listened, and lives");
}

#[test]
fn wait_reports_a_stall_and_release_unblocks_threads() {
    let (ram, mut client, _handler) = silent_server();
    let guest = std::thread::spawn(move || byte(&ram, 9));
    let (read, _write) = stop_pipe();
    assert_eq!(client.wait(read.as_fd(), SHORT).unwrap(), ServerEvent::Stalled);
    assert!(!guest.is_finished(), "the guest continued without its page");
    client.release();
    assert_eq!(guest.join().unwrap(), 0);
}

/// Not a test: the process of a server that other tests start. It serves one fault, reads another
/// one and waits.
#[test]
fn server_process() {
    let Some(path) = std::env::var_os("VESTA_TEST_PAGE_SERVER") else { return };
    let listener = UnixListener::bind(path).unwrap();
    println!("listening");
    let handler = Handler::accept(&listener);
    handler.serve_next(1);
    handler.event();
    println!("fault read");
    std::thread::park();
}

/// A run of this test program that only runs `name`.
fn test_process(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]);
    command
}

/// Starts the process of a server and waits until it listens.
fn start_process(command: &mut Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    wait_for(&mut child, "listening");
    child
}

/// Waits until the process has printed `text`.
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
    let (_dir, path) = socket_path();
    let (ram, mut client, mut child) = connect_to_process(&path);
    client.probe(&[], LONG, &()).unwrap();
    let guest = std::thread::spawn(move || byte(&ram, 7));
    // After this the fault no longer counts as unread.
    wait_for(&mut child, "fault read");
    kill(child);
    assert_gone_while_guest_waits(&mut client, guest);
    assert!(client.is_orphaned());
}

/// Checks that the server is reported as gone and `guest` waits for its page. Then releases it.
fn assert_gone_while_guest_waits(client: &mut PageServer, guest: JoinHandle<u8>) {
    assert_eq!(end_of(client), ServerEvent::Gone);
    assert!(!guest.is_finished(), "the guest continued without its page");
    client.release();
    guest.join().unwrap();
}

/// The first event other than [`ServerEvent::Closed`].
fn end_of(client: &mut PageServer) -> ServerEvent {
    let (read, _write) = stop_pipe();
    loop {
        let event = client.wait(read.as_fd(), SHORT).unwrap();
        if event != ServerEvent::Closed {
            return event;
        }
    }
}

#[test]
fn probe_fails_if_the_server_dies_before_it_answers() {
    let (_dir, path) = socket_path();
    let (_ram, client, child) = connect_to_process(&path);
    // Killed before the probe, it cannot answer.
    kill(child);
    let error = client.probe(&[], Duration::from_secs(2), &()).unwrap_err();
    assert!(matches!(error, PageServerError::Fetch(FetchError::Gone { .. })), "{error}");
}

/// Not a test: the process that listens, in the tests of servers that fork. It starts the process
/// that serves, and exits when it reads a byte.
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

/// Not a test: the process that serves. It exits when its standard input is closed.
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
            // Only for its end: what is written is for the process that listened.
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

/// A server whose listening process has ended.
struct Forked {
    input: ChildStdin,
    output: ChildStdout,
}

impl Forked {
    /// Makes it exit, and waits until it has exited.
    fn end(mut self) {
        drop(self.input);
        self.output.read_to_end(&mut Vec::new()).unwrap();
    }
}

/// Connects to a server whose listening process then exits. With `closes` the server closes the
/// connection and keeps only the userfaultfd.
fn connect_to_forked(closes: bool) -> (GuestRam, PageServer, Forked) {
    let (_dir, path) = socket_path();
    let mut command = test_process("listening_process");
    command.env("VESTA_TEST_FORKING_SERVER", &path).stdin(Stdio::piped());
    if closes {
        command.env("VESTA_TEST_CLOSES", "1");
    }
    let mut listening = start_process(&mut command);
    let (ram, client) = connect(1, &path);
    client.probe(&[], LONG, &()).unwrap();
    let mut input = listening.stdin.take().unwrap();
    input.write_all(b"x").unwrap();
    listening.wait().unwrap();
    (ram, client, Forked { input, output: listening.stdout.take().unwrap() })
}

/// Checks that the server still serves, and that the wait reports nothing meanwhile.
fn assert_serves(ram: &GuestRam, client: &mut PageServer) {
    let (read, write) = stop_pipe();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| client.wait(read.as_fd(), LONG).unwrap());
        for page in 100..120 {
            assert_eq!(byte(ram, page), page_byte(page));
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
    assert_gone_while_guest_waits(&mut client, guest);
}

#[test]
fn server_that_keeps_only_the_userfaultfd_is_alive() {
    let (ram, mut client, server) = connect_to_forked(true);
    let (read, _write) = stop_pipe();
    assert_eq!(client.wait(read.as_fd(), LONG).unwrap(), ServerEvent::Closed);
    assert!(client.is_orphaned());
    assert_serves(&ram, &mut client);
    client.probe(&[5 * PAGE, 9 * PAGE], LONG, &()).unwrap();
    server.end();
    let guest = std::thread::spawn(move || byte(&ram, 7));
    assert_gone_while_guest_waits(&mut client, guest);
}
