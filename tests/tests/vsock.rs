//! vsock connections between real guests and programs on the host.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vesta_tests::guest::{BOOT_TIMEOUT, Guest, Kernel, TIMEOUT, Transport, busybox, start, vmm_path};
use vesta_tests::initramfs::Initramfs;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::wait_for_text;
use vesta_tests::snapshots::{Files, pause, unconfigured};
use vesta_tests::vmm::{Vmm, VmmBuilder};
use vesta_tests::vsock::{self, FROM_GUEST, FROM_HOST, connect, port, receive, transmit, try_connect};
use vesta_tests::{on_each_kernel, on_each_transport};

/// A guest that runs `script`, with this vsock device.
fn boot_with(kernel: Kernel, transport: Transport, script: &str, vsock: Value) -> Result<Vmm> {
    boot_changed(kernel, transport, script, vsock, |guest| guest)
}

fn boot_changed(
    kernel: Kernel,
    transport: Transport,
    script: &str,
    vsock: Value,
    change: fn(Guest) -> Guest,
) -> Result<Vmm> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let mut initramfs = Initramfs::new(&busybox())?;
    if let Some(modules) = kernel.modules() {
        let bus = match transport {
            Transport::Mmio => "virtio_mmio",
            // Built into newer kernels.
            Transport::Pci => "virtio_pci",
        };
        let drivers = [bus, "vmw_vsock_virtio_transport"];
        let present: Vec<_> = drivers.into_iter().filter(|name| modules.file(name).exists()).collect();
        initramfs.modules(&modules, &present)?;
    }
    initramfs.file("bin/guest-vsock", 0o755, &std::fs::read(env!("CARGO_BIN_EXE_guest-vsock"))?);
    let guest = Guest::with_initramfs(kernel, initramfs, script, builder.dir())?.mem_mib(256);
    let mut config = change(guest).config();
    config["vsock"] = vsock;
    let builder = transport.args().iter().fold(builder.arg("--id").arg("parent"), VmmBuilder::arg);
    builder.with_api().with_config(&config)?.spawn()
}

fn boot(transport: Transport, script: &str) -> Result<Vmm> {
    boot_with(Kernel::Tuned, transport, script, json!({"guest_cid": 3, "uds_path": "v.sock"}))
}

/// A guest that serves; returns once it does.
fn serving(transport: Transport) -> Result<Vmm> {
    let vmm = boot(transport, "guest-vsock serve")?;
    vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
    Ok(vmm)
}

fn path(vmm: &Vmm) -> PathBuf {
    vmm.dir().join("v.sock")
}

/// A server on the host, for the guest's connections to this port.
fn serve(vmm: &Vmm, port: u32) -> Result<UnixListener> {
    Ok(UnixListener::bind(vmm.dir().join(format!("v.sock_{port}")))?)
}

/// Sends bytes and shuts down its half, and compares the bytes that it receives.
fn both_ways(stream: &UnixStream, index: u32, bytes: u32) -> Result<()> {
    let sender = stream.try_clone()?;
    let sending = thread::spawn(move || -> Result<()> {
        transmit(&sender, index, FROM_HOST, bytes)?;
        Ok(sender.shutdown(Shutdown::Write)?)
    });
    receive(stream, index, FROM_GUEST, bytes)?;
    sending.join().expect("it does not panic")
}

/// A client that sends as much as the guest accepts.
struct Greedy {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<u64>>,
    stream: UnixStream,
}

impl Greedy {
    fn start(path: &Path) -> Result<Greedy> {
        let stream = connect(path, port::SINK)?;
        let (mut sender, stop) = (stream.try_clone()?, Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let (piece, mut sent) = (vec![0; 64 << 10], 0);
            while !stopped.load(Ordering::Relaxed) {
                sender.write_all(&piece)?;
                sent += piece.len() as u64;
            }
            sender.shutdown(Shutdown::Write)?;
            Ok(sent)
        });
        Ok(Greedy { stop, thread, stream })
    }

    /// Stops, and checks that the guest received all that was sent.
    fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.thread.join().expect("it does not panic")?;
        let mut came = [0; 8];
        self.stream.read_exact(&mut came)?;
        anyhow::ensure!(sent > 0 && u64::from_le_bytes(came) == sent, "{sent} sent, {came:?} came");
        Ok(())
    }
}

fn join_all<T>(threads: Vec<thread::JoinHandle<Result<T>>>) -> Result<Vec<T>> {
    threads.into_iter().map(|thread| thread.join().expect("it does not panic")).collect()
}

on_each_transport! {
    /// 50 streams to the guest and 50 from it at once, each with its own data in both directions.
    fn fifty_streams_carry_data_in_both_directions(transport) {
        const STREAMS: u32 = 50;
        const BYTES: u32 = 200_003;
        let mut vmm = boot(transport, &format!(
            "guest-vsock serve &\nguest-vsock await 801\nguest-vsock duplex 800 {STREAMS} {BYTES}\nguest-vsock cid\nreboot -f"
        ))?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let host = path(&vmm);
        join_all((0..STREAMS).map(|index| {
            let host = host.clone();
            thread::spawn(move || {
                let mut stream = connect(&host, port::DUPLEX)?;
                stream.write_all(&[index.to_le_bytes(), BYTES.to_le_bytes()].concat())?;
                both_ways(&stream, index, BYTES)
            })
        }).collect())?;
        let server = serve(&vmm, 800)?;
        // The guest continues when this listens.
        let _gate = serve(&vmm, 801)?;
        let threads = (0..STREAMS).map(|_| {
            let (mut stream, _) = server.accept()?;
            Ok(thread::spawn(move || {
                let mut index = [0; 4];
                stream.read_exact(&mut index)?;
                both_ways(&stream, u32::from_le_bytes(index), BYTES)
            }))
        }).collect::<Result<_>>()?;
        join_all(threads)?;
        let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
        assert_eq!(code, 0, "{output}");
        assert!(output.contains(&format!("DUPLEX {STREAMS} streams of {BYTES} bytes")), "{output}");
        assert!(output.contains("CID 3"), "{output}");
        assert!(!host.exists(), "the socket file goes with the monitor");
        Ok(())
    }

    /// 1,000 connections to the guest, open at once. They are closed, opened again beside a
    /// continuous one, and abandoned.
    fn a_thousand_clients_are_served_at_once(transport) {
        let vmm = serving(transport)?;
        for round in 0..2u32 {
            let mut clients = Vec::new();
            for _ in 0..1000 {
                clients.push(connect(&path(&vmm), port::ECHO)?);
            }
            let greedy = (round > 0).then(|| Greedy::start(&path(&vmm))).transpose()?;
            for (index, client) in (0u32..).zip(&mut clients) {
                client.write_all(&(index ^ round).to_le_bytes())?;
            }
            for (index, client) in (0u32..).zip(&mut clients) {
                let mut back = [0; 4];
                client.read_exact(&mut back).with_context(|| format!("client {index}"))?;
                assert_eq!(back, (index ^ round).to_le_bytes());
            }
            greedy.map_or(Ok(()), Greedy::stop)?;
        }
        // Opened and abandoned: some before they send, some before they get an answer.
        for index in 0..1000 {
            let mut client = UnixStream::connect(path(&vmm))?;
            if index % 2 == 0 {
                client.write_all(b"CONNECT 1\n")?;
            }
        }
        let mut last = connect(&path(&vmm), port::ECHO)?;
        last.write_all(b"still there?")?;
        let mut back = [0; 12];
        last.read_exact(&mut back)?;
        assert_eq!(&back, b"still there?");
        Ok(())
    }

    /// Refusals reach the other side at once, from the guest and from the host.
    fn a_refusal_closes_at_once(transport) {
        let mut vmm = boot(transport, "guest-vsock serve &\nguest-vsock refused 98\nguest-vsock await 97\npoweroff -f")?;
        vmm.wait_for_output("REFUSED ConnectionReset quickly true", BOOT_TIMEOUT)?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let begun = Instant::now();
        for _ in 0..20 {
            assert!(try_connect(&path(&vmm), port::UNUSED)?.is_none());
        }
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?} for 20 refusals", begun.elapsed());
        let _gate = serve(&vmm, 97)?;
        assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
        Ok(())
    }

    /// Each side shuts down its half and still receives.
    fn each_half_of_a_stream_closes_by_itself(transport) {
        let mut vmm = boot(transport, "guest-vsock serve &\nguest-vsock await 97\nguest-vsock half 700\npoweroff -f")?;
        let server = serve(&vmm, 700)?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let mut client = connect(&path(&vmm), port::ANSWER)?;
        client.write_all(b"a question of the host's")?;
        client.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        assert_eq!(answer, "you said: a question of the host's");
        let _gate = serve(&vmm, 97)?;
        let (mut peer, _) = server.accept()?;
        let mut question = String::new();
        peer.read_to_string(&mut question)?;
        peer.write_all(format!("it said: {question}").as_bytes())?;
        drop(peer);
        vmm.wait_for_output("ANSWER it said: a question of the guest's", BOOT_TIMEOUT)?;
        assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
        Ok(())
    }

    /// Messages keep their boundaries in both directions.
    fn messages_keep_their_boundaries(transport) {
        let vsock = json!({"guest_cid": 77, "uds_path": "v.sock", "seqpacket_uds_path": "v.seq"});
        let script = "guest-vsock cid\nguest-vsock serve &\nguest-vsock await 97\nguest-vsock messages 600\nguest-vsock burst 600\n\
            guest-vsock small 16384 601 1048576\nguest-vsock small 65536 601 1048576\npoweroff -f";
        let mut vmm = boot_with(Kernel::Tuned, transport, script, vsock)?;
        vmm.wait_for_output("CID 77", BOOT_TIMEOUT)?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let client = seqpacket::connect(&vmm.dir().join("v.seq"))?;
        seqpacket::send(&client, b"CONNECT 7\n")?;
        assert!(seqpacket::receive(&client)?.starts_with(b"OK "));
        for len in [1usize, 1000, 65_536, 3] {
            let message: Vec<u8> = (0..len).map(|at| (at % 253) as u8).collect();
            seqpacket::send(&client, &message)?;
            assert!(seqpacket::receive(&client)? == message, "a message of {len} bytes");
        }
        // A guest that reads late gets all of many small messages, and applies backpressure
        // meanwhile.
        let client = seqpacket::connect(&vmm.dir().join("v.seq"))?;
        seqpacket::send(&client, format!("CONNECT {}\n", port::LATE).as_bytes())?;
        assert!(seqpacket::receive(&client)?.starts_with(b"OK "));
        // More than Linux queues unread (455), far less than it and the client's socket together.
        for _ in 0..500 {
            seqpacket::send(&client, b"8 bytes!")?;
        }
        let _late = serve(&vmm, port::LATE_GATE)?;
        for _ in 500..3000 {
            seqpacket::send(&client, b"8 bytes!")?;
        }
        rustix::net::shutdown(&client, rustix::net::Shutdown::Write)?;
        assert_eq!(seqpacket::receive(&client)?, 3000u32.to_le_bytes());

        let server = seqpacket::serve(&vmm.dir().join("v.sock_600"))?;
        let small = serve(&vmm, 601)?;
        let _gate = serve(&vmm, 97)?;
        let peer = rustix::net::accept(&server)?;
        loop {
            let message = seqpacket::receive(&peer)?;
            if message.is_empty() {
                break;
            }
            seqpacket::send(&peer, &message)?;
        }
        vmm.wait_for_output("MESSAGES echoed", BOOT_TIMEOUT)?;
        let peer = rustix::net::accept(&server)?;
        assert_eq!(seqpacket::receive(&peer)?, b"x");
        assert!(seqpacket::receive(&peer)? == vec![7; 65_536]);
        seqpacket::send(&peer, b"both came")?;
        vmm.wait_for_output("BURST both came", BOOT_TIMEOUT)?;
        // A guest with a small buffer sends any amount.
        for _ in 0..2 {
            let (stream, _) = small.accept()?;
            stream.set_read_timeout(Some(BOOT_TIMEOUT))?;
            receive(&stream, 0, FROM_GUEST, 1 << 20)?;
        }
        assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
        Ok(())
    }
}

on_each_transport! {
    /// The parent's connections continue. The child starts without connections: its programs see
    /// resets, and it has its own socket.
    fn a_forked_child_has_its_own_connections(transport) {
        let mut vmm = boot(transport, "guest-vsock serve &\nguest-vsock await 97\nguest-vsock hold 500\nguest-vsock cid\nsleep 1000")?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let (held, _gate) = (serve(&vmm, 500)?, serve(&vmm, 97)?);
        let (mut held, _) = held.accept()?;
        vmm.wait_for_output("HELD", BOOT_TIMEOUT)?;
        let mut before = connect(&path(&vmm), port::ECHO)?;

        // The child outlives its parent and the parent's directory.
        let home = tempfile::tempdir()?;
        let (its_socket, serial) = (home.path().join("child.sock"), home.path().join("serial"));
        let child = |id: &str, vsock: Value| json!({
            "id": id, "serial": {"serial_out_path": serial}, "vsock_override": vsock,
        });
        let mut api = vmm.ready_client(TIMEOUT)?;
        for (vsock, named) in [
            (json!({"uds_path": path(&vmm)}), "another process listens on it"),
            (json!({"uds_path": ""}), "uds_path"),
            (json!({"uds_path": its_socket, "port": 1}), "`port`"),
        ] {
            let refused = api.put("/fork", &json!({"children": [child("a", vsock)]}))?;
            assert_eq!(refused.status, 400);
            assert!(refused.fault().contains(named), "{refused:?}");
        }
        let children = json!([child("a", json!({"uds_path": its_socket, "guest_cid": 9})), {"id": "b"}]);
        let reply = api.put("/fork", &json!({"children": children}))?.ok()?.json()?;
        let orphans = Orphans::of_fork(&reply)?;

        before.write_all(b"still the parent")?;
        let mut back = [0; 16];
        before.read_exact(&mut back)?;
        assert_eq!(&back, b"still the parent");
        let mut new = connect(&its_socket, port::ECHO)?;
        new.write_all(b"hello child")?;
        let mut back = [0; 11];
        new.read_exact(&mut back)?;
        assert_eq!(&back, b"hello child");
        wait_for_text(&serial, "LOST", BOOT_TIMEOUT)?;
        wait_for_text(&serial, "CID 9", BOOT_TIMEOUT)?;
        assert!(!vmm.stdout.text().contains("LOST"), "the parent's connections were lost");

        // No other process has the parent's ends of its connections.
        vmm.signal(rustix::process::Signal::KILL)?;
        vmm.exit_status(TIMEOUT)?;
        for stream in [&mut before, &mut held] {
            stream.set_read_timeout(Some(TIMEOUT))?;
            assert!(matches!(stream.read(&mut back), Ok(0)), "it is at its end");
        }
        new.write_all(b"still there")?;
        new.read_exact(&mut back)?;
        assert_eq!(orphans.running()?, 2);
        orphans.kill(TIMEOUT)
    }
}

on_each_transport! {
    /// Programs in a restored guest see their connections reset, and the guest is reached at
    /// another socket.
    fn a_restored_microvm_is_reached_at_another_socket(transport) {
        let vmm = boot(transport, "guest-vsock serve &\nguest-vsock await 97\nguest-vsock hold 500\nguest-vsock cid\nsleep 1000")?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let (_held, _gate) = (serve(&vmm, 500)?, serve(&vmm, 97)?);
        vmm.wait_for_output("HELD", BOOT_TIMEOUT)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        let files = tempfile::tempdir()?;
        let (state, memory) = (files.path().join("state"), files.path().join("memory"));
        api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
        api.put("/snapshot/create", &json!({"snapshot_path": state, "mem_file_path": memory}))?.ok()?;

        let builder = transport.args().iter().fold(VmmBuilder::new(&vmm_path())?.with_api(), VmmBuilder::arg);
        let loaded = builder.spawn()?;
        let mut api = loaded.ready_client(TIMEOUT)?;
        let load = |more: Value| {
            let mut body = json!({
                "snapshot_path": state, "mem_backend": {"backend_type": "File", "backend_path": memory}, "resume_vm": true,
            });
            body["vsock_override"] = more;
            body
        };
        // The first guest still has the old socket.
        let in_use = api.put("/snapshot/load", &load(json!({"uds_path": path(&vmm)})))?;
        assert!(in_use.status == 400 && in_use.fault().contains("another process listens on it"), "{in_use:?}");
        api.put("/snapshot/load", &load(json!({"uds_path": "new.sock", "guest_cid": 12})))?.ok()?;
        let mut stream = connect(&loaded.dir().join("new.sock"), port::ECHO)?;
        stream.write_all(b"hello again")?;
        let mut back = [0; 11];
        stream.read_exact(&mut back)?;
        assert_eq!(&back, b"hello again");
        loaded.wait_for_output("LOST", BOOT_TIMEOUT)?;
        loaded.wait_for_output("CID 12", BOOT_TIMEOUT)?;
        assert_eq!(api.get("/vm/config")?.json()?["vsock"], json!({"guest_cid": 12, "uds_path": "new.sock"}));
        Ok(())
    }
}

on_each_transport! {
    /// A restored guest whose vCPUs all write to the serial port without a pause accepts a client
    /// that connects at once.
    fn a_busy_restored_guest_accepts_connections_at_once(transport) {
        let script = "guest-vsock serve &\nguest-vsock await 97\nyes flood > /dev/ttyS0 &\nyes flood > /dev/ttyS0";
        let vsock = json!({"guest_cid": 3, "uds_path": "v.sock"});
        let vmm = boot_changed(Kernel::Tuned, transport, script, vsock, |guest| guest.vcpus(2))?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let _gate = serve(&vmm, 97)?;
        vmm.wait_for_output("flood", BOOT_TIMEOUT)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        let files = Files::new(vmm.dir(), "busy");
        pause(&mut api)?;
        api.put("/snapshot/create", &files.create("Full"))?.ok()?;
        let (loaded, mut api) = unconfigured(transport)?;
        api.put("/snapshot/load", &files.load())?.ok()?;
        // None of the immediate connections is reset.
        let clients = (0..8).map(|_| {
            let socket = path(&loaded);
            thread::spawn(move || -> Result<()> {
                let mut stream = connect(&socket, port::ECHO)?;
                for byte in 0..4 {
                    stream.write_all(&[byte])?;
                    let mut back = [0xff];
                    stream.read_exact(&mut back)?;
                    assert_eq!(back, [byte]);
                }
                Ok(())
            })
        });
        join_all(clients.collect())?;
        Ok(())
    }
}

/// Seqpacket sockets on the host.
mod seqpacket {
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use anyhow::Result;
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

    fn socket() -> Result<OwnedFd> {
        Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
    }

    pub(crate) fn connect(path: &Path) -> Result<OwnedFd> {
        let socket = socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    }

    pub(crate) fn serve(path: &Path) -> Result<OwnedFd> {
        let socket = socket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 8)?;
        Ok(socket)
    }

    pub(crate) fn send(to: &OwnedFd, message: &[u8]) -> Result<()> {
        assert_eq!(rustix::net::send(to, message, SendFlags::NOSIGNAL)?, message.len());
        Ok(())
    }

    pub(crate) fn receive(from: &OwnedFd) -> Result<Vec<u8>> {
        let mut message = vec![0; 100_000];
        let (len, _) = rustix::net::recv(from, &mut message[..], RecvFlags::empty())?;
        message.truncate(len);
        Ok(message)
    }
}

#[test]
fn a_thousand_guest_connections_are_served_or_abandoned() -> Result<()> {
    let script =
        "guest-vsock crowd 900 1000\nguest-vsock abandon 900 1000\nguest-vsock crowd 900 1000\npoweroff -f";
    let mut vmm = boot(Transport::Mmio, &format!("guest-vsock await 901\n{script}"))?;
    let server = serve(&vmm, 900)?;
    let _gate = serve(&vmm, 901)?;
    let echoes = thread::spawn(move || -> Result<()> {
        let mut threads = Vec::new();
        for _ in 0..3000 {
            let (mut stream, _) = server.accept()?;
            let echo = move || {
                let mut bytes = [0; 64];
                while let Ok(len @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..len]).is_err() {
                        break;
                    }
                }
            };
            threads.push(thread::Builder::new().stack_size(64 << 10).spawn(echo)?);
        }
        // Every connection ends.
        for thread in threads {
            thread.join().expect("it does not panic");
        }
        Ok(())
    });
    let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
    assert_eq!(code, 0, "{output}");
    assert_eq!(output.matches("CROWD 1000").count(), 2, "{output}");
    assert!(output.contains("ABANDONED 1000"), "{output}");
    echoes.join().expect("it does not panic")
}

#[test]
fn a_stalled_or_dead_peer_delays_no_other_connection() -> Result<()> {
    let vmm = serving(Transport::Mmio)?;
    // The guest does not read: the host's writes block, and nothing else does.
    let lazy = connect(&path(&vmm), port::LAZY)?;
    lazy.set_nonblocking(true)?;
    let mut stuffed = 0;
    let piece = vec![0; 65536];
    while let Ok(len) = (&lazy).write(&piece) {
        stuffed += len;
    }
    // The host does not read: the guest's writes block.
    let mut unread = connect(&path(&vmm), port::SOURCE)?;
    unread.write_all(&(8u64 << 20).to_le_bytes())?;
    // The host closes in the middle.
    let mut dies = connect(&path(&vmm), port::SOURCE)?;
    dies.write_all(&(8u64 << 20).to_le_bytes())?;
    dies.read_exact(&mut [0; 1000])?;
    drop(dies);
    for index in 0..4 {
        let mut stream = connect(&path(&vmm), port::DUPLEX)?;
        stream.write_all(&[index, 500_000u32].map(u32::to_le_bytes).concat())?;
        both_ways(&stream, index, 500_000)?;
    }
    assert!(stuffed > 0);
    // A late reader gets all data.
    let mut rest = Vec::new();
    unread.read_to_end(&mut rest)?;
    assert_eq!(rest.len(), 8 << 20);
    Ok(())
}

#[test]
fn connections_survive_a_pause_of_the_guest() -> Result<()> {
    let vmm = serving(Transport::Pci)?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let mut before = connect(&path(&vmm), port::ECHO)?;
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    before.write_all(b"while it is paused")?;
    let mut during = UnixStream::connect(path(&vmm))?;
    during.write_all(b"CONNECT 1\n")?;
    before.set_nonblocking(true)?;
    assert!(before.read(&mut [0; 8]).is_err(), "an answer arrived early");
    before.set_nonblocking(false)?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    let mut back = [0; 18];
    before.read_exact(&mut back)?;
    assert_eq!(&back, b"while it is paused");
    let mut ok = [0; 3];
    during.read_exact(&mut ok)?;
    assert_eq!(&ok, b"OK ");
    Ok(())
}

on_each_kernel! {
    /// Drivers of several years: with a buffer in two descriptors, and in one.
    fn the_driver_of_every_kernel_works(kernel) {
        let transport = if kernel == Kernel::Debian6_1 { Transport::Pci } else { Transport::Mmio };
        let vsock = json!({"guest_cid": 3, "uds_path": "v.sock"});
        let vmm = boot_with(kernel, transport, "guest-vsock serve", vsock)?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        for index in 0..3 {
            let mut stream = connect(&path(&vmm), port::DUPLEX)?;
            stream.write_all(&[index, 300_001u32].map(u32::to_le_bytes).concat())?;
            both_ways(&stream, index, 300_001)?;
        }
        assert!(vsock::try_connect(&path(&vmm), port::UNUSED)?.is_none());
        Ok(())
    }
}

#[test]
fn the_api_accepts_clients_requests_and_refuses_invalid_ones() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let guest = Guest::linux(Kernel::quickest(), "sleep 1000", builder.dir())?;
    let mut vmm = builder.with_api().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    guest.put(&mut api)?;
    std::fs::write(vmm.dir().join("file"), "mine")?;
    for (body, named) in [
        (json!({"guest_cid": 3}), "uds_path"),
        (json!({"uds_path": "v.sock"}), "guest_cid"),
        (json!({"guest_cid": 3, "uds_path": ""}), "uds_path"),
        (json!({"guest_cid": 3, "uds_path": "x".repeat(108)}), "108"),
        (json!({"guest_cid": 3, "uds_path": "missing/v.sock"}), "missing/v.sock"),
        (json!({"guest_cid": 3, "uds_path": "file"}), "not a socket"),
        (json!({"guest_cid": 3, "uds_path": "v.sock", "port": 1}), "`port`"),
        (json!({"guest_cid": -1, "uds_path": "v.sock"}), "invalid value"),
    ] {
        let refused = api.put("/vsock", &body)?;
        assert_eq!(refused.status, 400, "{body}");
        assert!(refused.fault().contains(named), "{named}: {refused:?}");
    }
    assert_eq!(std::fs::read(vmm.dir().join("file"))?, b"mine");
    assert_eq!(api.get("/vm/config")?.json()?["vsock"], Value::Null);
    // What firecracker-containerd and Kata send; Kata sends it twice.
    let first =
        api.put("/vsock", &json!({"guest_cid": 0, "uds_path": "old.sock", "vsock_id": "agent_api"}))?.ok()?;
    assert_eq!(first.header("deprecation"), Some("true"));
    assert!(vmm.dir().join("old.sock").exists(), "it is there before the start");
    for _ in 0..2 {
        api.put("/vsock", &json!({"guest_cid": 3, "uds_path": "v.sock"}))?.ok()?;
    }
    assert!(!vmm.dir().join("old.sock").exists() && path(&vmm).exists());
    assert_eq!(api.get("/vm/config")?.json()?["vsock"], json!({"guest_cid": 3, "uds_path": "v.sock"}));
    start(&mut api)?;
    let late = api.put("/vsock", &json!({"guest_cid": 3, "uds_path": "late.sock"}))?;
    assert!(
        late.status == 400 && late.fault().contains("not supported after starting the microVM"),
        "{late:?}"
    );
    vmm.signal(rustix::process::Signal::TERM)?;
    vmm.exit_status(TIMEOUT)?;
    assert!(!path(&vmm).exists(), "a monitor that ends in good order takes its socket with it");
    Ok(())
}
