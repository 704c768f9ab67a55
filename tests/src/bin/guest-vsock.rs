//! `guest-vsock`: uses a guest's vsock device, as a server for programs on the host or as a client.
//!
//! | command | what it does |
//! |---|---|
//! | `serve` | serves the ports of [`vesta_tests::vsock::port`], each connection on a thread of its own; prints `SERVING` |
//! | `cid` | prints the guest's CID |
//! | `duplex PORT COUNT BYTES` | opens COUNT streams at once, transfers BYTES in both directions on each, and compares them |
//! | `crowd PORT COUNT` | opens COUNT connections at once, checks an echo over each, and closes them |
//! | `abandon PORT COUNT` | opens COUNT connections and exits |
//! | `refused PORT` | connects to a port without a listener |
//! | `await PORT` | returns once a host program listens |
//! | `half PORT` | sends a request, shuts down its half, prints the answer |
//! | `messages PORT` | sends messages of several lengths, which are echoed |
//! | `small SIZE PORT BYTES` | sends BYTES over a stream with a buffer of SIZE bytes (`SO_VM_SOCKETS_BUFFER_SIZE`) |
//! | `burst PORT` | sends a short message and at once the longest, then receives one |
//! | `wake DISK COUNT` | prints the median time of COUNT reads of one sector of a disk, in nanoseconds |
//! | `until FILE PORT` | sends bytes, which are echoed, until FILE exists: see [`exchange::until`] |
//! | `hold PORT` | connects, prints `HELD`, and prints `LOST` when the connection is lost |

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use vesta_tests::exchange;
use vesta_tests::vsock::{self, port, receive, transmit};

/// The stack size of a connection's thread: there may be thousands.
const STACK: usize = 128 << 10;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|arg| arg.parse::<u32>().ok()).unwrap_or(0);
    let result = match args.first().map(String::as_str) {
        Some("serve") => serve(),
        Some("cid") => cid(),
        Some("duplex") => duplex(number(1), number(2), number(3)),
        Some("crowd") => crowd(number(1), number(2)),
        Some("abandon") => abandon(number(1), number(2)),
        Some("refused") => refused(number(1)),
        Some("await") => await_server(number(1)),
        Some("half") => half(number(1)),
        Some("messages") => messages(number(1)),
        Some("small") => small(number(1), number(2), number(3)),
        Some("burst") => burst(number(1)),
        Some("wake") => wake(args.get(1).map_or("", String::as_str), number(2)),
        Some("until") => {
            let file = args.get(1).map_or("", String::as_str);
            exchange::until("vsock", Path::new(file), || connect(number(2), libc::SOCK_STREAM))
        }
        Some("hold") => hold(number(1)),
        _ => Err(io::Error::other("which command?")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAILED {args:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    type Handler = fn(UnixStream) -> io::Result<()>;
    let handlers: [(u32, i32, Handler); 9] = [
        (port::ECHO, libc::SOCK_STREAM, echo),
        (port::SINK, libc::SOCK_STREAM, sink),
        (port::SOURCE, libc::SOCK_STREAM, source),
        (port::DUPLEX, libc::SOCK_STREAM, duplex_peer),
        (port::ANSWER, libc::SOCK_STREAM, answer),
        (port::LAZY, libc::SOCK_STREAM, lazy),
        (port::MESSAGES, libc::SOCK_SEQPACKET, echo),
        (port::COUNTED, libc::SOCK_STREAM, counted),
        (port::LATE, libc::SOCK_SEQPACKET, late),
    ];
    let mut threads = Vec::new();
    for (port, kind, handler) in handlers {
        let listener = listen(port, kind)?;
        threads.push(thread::spawn(move || -> io::Result<()> {
            loop {
                let stream = UnixStream::from(rustix::net::accept(&listener)?);
                let handle = move || {
                    if let Err(error) = handler(stream) {
                        println!("port {port}: {error}");
                    }
                };
                thread::Builder::new().stack_size(STACK).spawn(handle)?;
            }
        }));
    }
    println!("SERVING");
    threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
}

/// Echoes bytes.
fn echo(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 66_000];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            len => stream.write_all(&buffer[..len])?,
        }
    }
}

/// Reads to the end, then sends the length.
fn sink(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut count = 0u64;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&count.to_le_bytes()),
            len => count += len as u64,
        }
    }
}

/// Reads a length and so many bytes, then sends the length.
fn counted(mut stream: UnixStream) -> io::Result<()> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let (wanted, mut count) = (u64::from_le_bytes(length), 0);
    let mut buffer = vec![0; 256 << 10];
    while count < wanted {
        match stream.read(&mut buffer)? {
            0 => break,
            len => count += len as u64,
        }
    }
    stream.write_all(&count.to_le_bytes())
}

/// Reads a length, then sends so many bytes.
fn source(mut stream: UnixStream) -> io::Result<()> {
    let mut left = [0; 8];
    stream.read_exact(&mut left)?;
    let mut left = u64::from_le_bytes(left);
    let buffer = vec![7; 64 << 10];
    while left > 0 {
        let len = left.min(buffer.len() as u64) as usize;
        stream.write_all(&buffer[..len])?;
        left -= len as u64;
    }
    Ok(())
}

/// Transfers in both directions at once, as the other side requests.
fn duplex_peer(mut stream: UnixStream) -> io::Result<()> {
    let mut order = [0; 8];
    stream.read_exact(&mut order)?;
    let [index, bytes] =
        [0, 4].map(|at| u32::from_le_bytes(order[at..at + 4].try_into().expect("four bytes")));
    both_ways(&stream, index, bytes)
}

/// Sends bytes and shuts down its half, and compares the bytes that it receives.
fn both_ways(stream: &UnixStream, index: u32, bytes: u32) -> io::Result<()> {
    let sender = stream.try_clone()?;
    let sending = thread::Builder::new().stack_size(STACK).spawn(move || {
        transmit(&sender, index, vsock::FROM_GUEST, bytes)?;
        sender.shutdown(Shutdown::Write)
    })?;
    receive(stream, index, vsock::FROM_HOST, bytes)?;
    sending.join().expect("it does not panic")
}

/// Reads to the end, then sends an answer with the length.
fn answer(mut stream: UnixStream) -> io::Result<()> {
    let mut asked = String::new();
    stream.read_to_string(&mut asked)?;
    stream.write_all(format!("you said: {asked}").as_bytes())
}

/// Reads nothing until the other side has closed.
#[expect(clippy::needless_pass_by_value, reason = "a handler has its connection")]
fn lazy(stream: UnixStream) -> io::Result<()> {
    rustix::event::poll(&mut [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::RDHUP)], None)?;
    Ok(())
}

/// Reads nothing until the host listens at [`port::LATE_GATE`]; then reads all messages, and
/// answers with their number.
fn late(mut stream: UnixStream) -> io::Result<()> {
    await_server(port::LATE_GATE)?;
    let (mut count, mut message) = (0u32, [0; 64]);
    while stream.read(&mut message)? > 0 {
        count += 1;
    }
    stream.write_all(&count.to_le_bytes())
}

/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID`.
const GET_LOCAL_CID: libc::Ioctl = 0x7b9;

fn cid() -> io::Result<()> {
    let device = std::fs::File::open("/dev/vsock")?;
    let mut cid: u32 = 0;
    // SAFETY: the ioctl writes a 32-bit number, and the address is that of one.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    println!("CID {cid}");
    Ok(())
}

/// `SO_VM_SOCKETS_BUFFER_SIZE`, `SO_VM_SOCKETS_BUFFER_MIN_SIZE`.
const BUFFER_SIZE: [i32; 2] = [0, 1];

fn small(size: u32, port: u32, bytes: u32) -> io::Result<()> {
    let size = u64::from(size);
    let stream = connect_with(port, libc::SOCK_STREAM, |socket| {
        BUFFER_SIZE.iter().rev().try_for_each(|&option| {
            let len = size_of::<u64>() as libc::socklen_t;
            // SAFETY: the option's value is a 64-bit number, and `size` is one.
            let done = unsafe {
                libc::setsockopt(socket.as_raw_fd(), libc::AF_VSOCK, option, (&raw const size).cast(), len)
            };
            if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        })
    })?;
    transmit(&stream, 0, vsock::FROM_GUEST, bytes)?;
    println!("SENT {bytes} bytes");
    Ok(())
}

fn duplex(port: u32, count: u32, bytes: u32) -> io::Result<()> {
    let threads: Vec<_> = (0..count)
        .map(|index| {
            thread::spawn(move || {
                let mut stream = connect(port, libc::SOCK_STREAM)?;
                stream.write_all(&index.to_le_bytes())?;
                both_ways(&stream, index, bytes)
            })
        })
        .collect();
    threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))?;
    println!("DUPLEX {count} streams of {bytes} bytes both ways");
    Ok(())
}

fn crowd(port: u32, count: u32) -> io::Result<()> {
    let begun = Instant::now();
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(connect(port, libc::SOCK_STREAM)?);
    }
    println!("OPEN {count} after {} ms", begun.elapsed().as_millis());
    for (index, stream) in (0u32..).zip(&mut streams) {
        stream.write_all(&index.to_le_bytes())?;
    }
    for (index, stream) in (0u32..).zip(&mut streams) {
        let mut back = [0; 4];
        stream.read_exact(&mut back)?;
        if back != index.to_le_bytes() {
            return Err(io::Error::other(format!("stream {index} got {back:?}")));
        }
    }
    println!("CROWD {count} after {} ms", begun.elapsed().as_millis());
    Ok(())
}

fn abandon(port: u32, count: u32) -> io::Result<()> {
    let streams: Vec<_> = (0..count).map(|_| connect(port, libc::SOCK_STREAM)).collect::<Result<_, _>>()?;
    println!("ABANDONED {}", streams.len());
    std::process::exit(0);
}

fn refused(port: u32) -> io::Result<()> {
    let begun = Instant::now();
    match connect(port, libc::SOCK_STREAM) {
        Ok(_) => Err(io::Error::other("something listens")),
        Err(error) => {
            println!("REFUSED {:?} quickly {}", error.kind(), begun.elapsed().as_secs() < 1);
            Ok(())
        }
    }
}

fn await_server(port: u32) -> io::Result<()> {
    // Nothing notifies of a new server.
    while let Err(error) = connect(port, libc::SOCK_STREAM) {
        if error.kind() != ErrorKind::ConnectionReset {
            return Err(error);
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn half(port: u32) -> io::Result<()> {
    let mut stream = connect(port, libc::SOCK_STREAM)?;
    stream.write_all(b"a question of the guest's")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    println!("ANSWER {answer}");
    Ok(())
}

fn messages(port: u32) -> io::Result<()> {
    let mut stream = connect(port, libc::SOCK_SEQPACKET)?;
    for len in [1u32, 100, 5000, 65_536, 2] {
        let message: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        stream.write_all(&message)?;
        let mut back = vec![0; 66_000];
        let got = stream.read(&mut back)?;
        if back[..got] != message[..] {
            return Err(io::Error::other(format!("a message of {len} bytes came back as one of {got}")));
        }
    }
    println!("MESSAGES echoed");
    Ok(())
}

/// The second message needs all credit, of which the first has some until it is delivered.
fn burst(port: u32) -> io::Result<()> {
    let mut stream = connect(port, libc::SOCK_SEQPACKET)?;
    stream.write_all(b"x")?;
    stream.write_all(&vec![7; 65_536])?;
    let mut answer = [0; 64];
    let len = stream.read(&mut answer)?;
    println!("BURST {}", String::from_utf8_lossy(&answer[..len]));
    Ok(())
}

fn wake(disk: &str, count: u32) -> io::Result<()> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let disk = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let mut memory = vec![0; 1024];
    // O_DIRECT needs a buffer that is aligned to a sector.
    let from = memory.as_ptr().align_offset(512);
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        disk.read_exact_at(&mut memory[from..from + 512], 0)?;
        times.push(begun.elapsed().as_nanos());
    }
    times.sort_unstable();
    println!("WAKE {}", times.get(times.len() / 2).copied().unwrap_or(0));
    Ok(())
}

fn hold(port: u32) -> io::Result<()> {
    let mut stream = connect(port, libc::SOCK_STREAM)?;
    println!("HELD");
    let mut end = [0; 1];
    match stream.read(&mut end) {
        Ok(0) => println!("LOST at its end"),
        Ok(_) => println!("GOT {end:?}"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => println!("LOST by a reset"),
        Err(error) => return Err(error),
    }
    Ok(())
}

fn socket(kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all fields of the address are numbers, for which zero is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as _;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

fn connect(port: u32, kind: i32) -> io::Result<UnixStream> {
    connect_with(port, kind, |_| Ok(()))
}

/// Calls `set_up` with a new socket and connects it. `UnixStream` only makes system calls that
/// every stream socket has.
fn connect_with(
    port: u32,
    kind: i32,
    set_up: impl FnOnce(&OwnedFd) -> io::Result<()>,
) -> io::Result<UnixStream> {
    let (fd, address) = (socket(kind)?, address(libc::VMADDR_CID_HOST, port));
    set_up(&fd)?;
    // SAFETY: the address has the given length and outlives the call.
    let done = unsafe {
        libc::connect(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(fd.into()) }
}

fn listen(port: u32, kind: i32) -> io::Result<OwnedFd> {
    let (fd, address) = (socket(kind)?, address(libc::VMADDR_CID_ANY, port));
    // SAFETY: the address has the given length and outlives the call.
    let done = unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::listen(&fd, 4096)?;
    Ok(fd)
}
