//! A guest with a vsock driver that a test controls, and its host.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use config::HugePages;
use memory::GuestRam;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromZeros, IntoBytes};

use crate::packet::{HEADER_LEN, HOST_CID, Header, Op, SocketKind};
use crate::{HostSockets, Listener, SocketFile, Vsock, VsockControl, VsockState};
use virtio::testing::{BAR, DriverQueue, Guest, Kind, MMIO, RUNNING, TestWorker, TransportState, WRITE};

pub(super) const MS: u64 = 1_000_000;
pub(super) const CID: u64 = 3;
const SIZE: u16 = 256;
const QUEUES: [u64; 3] = [0x1_0000, 0x2_0000, 0x3_0000];
const EVENTS: u64 = 0x4_0000;
const UNUSED_QUEUE: u64 = 0x4_8000;
const TX: u64 = 0x5_0000;
/// Distance of the buffers for packets to the device, so that several can be in flight.
const TX_STEP: u64 = 0x2_0000;
const TX_BUFFERS: u64 = 16;
pub(super) const RX: u64 = 0x30_0000;
const RX_STEP: u64 = 0x2000;

/// A packet that the guest has received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) header: Header,
    pub(super) data: Vec<u8>,
}

impl Packet {
    pub(super) fn op(&self) -> Op {
        Op::of(self.header.op.get()).expect("the device knows its operations")
    }

    pub(super) fn flags(&self) -> u32 {
        self.header.flags.get()
    }
}

/// The guest's end of a connection, with its credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub(super) port: u32,
    pub(super) host_port: u32,
    pub(super) kind: SocketKind,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

/// A guest with the device and its driver, and a host directory with the device's sockets.
pub(super) struct Rig {
    pub(super) guest: Guest,
    pub(super) control: VsockControl,
    rx: DriverQueue,
    tx: DriverQueue,
    pub(super) events: DriverQueue,
    /// Length of each RX buffer.
    rx_len: u32,
    /// RX buffers that the device has: their heads and addresses.
    rx_out: VecDeque<(u16, u64)>,
    /// Addresses of the other RX buffers.
    rx_free: Vec<u64>,
    /// Index of the next TX buffer.
    tx_next: u64,
    received: VecDeque<Packet>,
    dir: TempDir,
    files: Vec<SocketFile>,
}

impl Rig {
    /// A rig with 64 RX buffers for 4 KiB of data each.
    pub(super) fn new(kind: Kind) -> Rig {
        Rig::with(kind, 64, 4096 + HEADER_LEN)
    }

    /// A rig with this number of RX buffers of `rx_len` bytes each.
    pub(super) fn with(kind: Kind, buffers: u64, rx_len: u32) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let (sockets, files) = sockets(&dir);
        let (device, control) = Vsock::new(CID as u32, sockets);
        let ram = GuestRam::map(8, HugePages::None, true).expect("8 MiB can be mapped");
        let guest = Guest::with(kind, Box::new(device), ram, TestWorker::new());
        let queues = QUEUES.map(|base| DriverQueue::new(&guest.ram, base, SIZE, 1 << 29));
        let [rx, tx, events] = queues;
        let mut rig = Rig {
            guest,
            control,
            rx,
            tx,
            events,
            rx_len,
            rx_out: VecDeque::new(),
            rx_free: (0..buffers).map(|i| RX + RX_STEP * i).collect(),
            tx_next: 0,
            received: VecDeque::new(),
            dir,
            files,
        };
        rig.start();
        rig
    }

    /// Starts the driver, again if it has been started before.
    pub(super) fn start(&mut self) {
        self.rx_free.extend(self.rx_out.drain(..).map(|(_, addr)| addr));
        let features = self.guest.negotiate(true);
        let queues = QUEUES.map(|base| DriverQueue::new(&self.guest.ram, base, SIZE, features));
        for (index, queue) in (0..).zip(&queues) {
            self.guest.select_queue(index);
            self.guest.set_up_queue(&queue.state());
        }
        [self.rx, self.tx, self.events] = queues;
        self.guest.map_vectors();
        self.guest.set_status(RUNNING);
        self.guest.worker.run();
        for i in 0..8 {
            self.events.add(&[], &[(EVENTS + 8 * i, 4)]).unwrap();
        }
        self.events.publish();
        self.guest.kick(2);
        self.give_buffers();
    }

    /// Gives the device all free RX buffers.
    pub(super) fn give_buffers(&mut self) {
        while let Some(addr) = self.rx_free.pop() {
            let (header, data) =
                ((addr, HEADER_LEN), (addr + u64::from(HEADER_LEN), self.rx_len - HEADER_LEN));
            // Every second chain has the header in a descriptor of its own.
            let head = if addr & RX_STEP == 0 {
                self.rx.add(&[], &[header, data])
            } else {
                self.rx.add(&[], &[(addr, self.rx_len)])
            };
            self.rx_out.push_back((head.expect("the queue has free descriptors"), addr));
        }
        if self.rx.publish() {
            self.guest.kick(0);
        }
    }

    /// Takes the packets that have arrived, without giving their buffers back.
    fn take_packets(&mut self) {
        while let Some(used) = self.rx.take_used() {
            let at = self.rx_out.iter().position(|(head, _)| *head == used.head).unwrap();
            let (_, addr) = self.rx_out.remove(at).unwrap();
            self.rx_free.push(addr);
            assert!(used.written >= HEADER_LEN, "a packet has a header");
            let mut header = Header::new_zeroed();
            self.guest.ram.memory().read_slice(header.as_mut_bytes(), GuestAddress(addr)).unwrap();
            assert_eq!(header.len.get(), used.written - HEADER_LEN, "the length is that of the data");
            let mut data = vec![0; header.len.get() as usize];
            let at = GuestAddress(addr + u64::from(HEADER_LEN));
            self.guest.ram.memory().read_slice(&mut data, at).unwrap();
            self.received.push_back(Packet { header, data });
        }
    }

    /// The next packet, if there is one. Its buffer is given back when no packet is left.
    pub(super) fn next(&mut self) -> Option<Packet> {
        self.guest.worker.run();
        self.take_packets();
        if self.received.is_empty() {
            self.give_buffers();
            self.guest.worker.run();
            self.take_packets();
        }
        self.received.pop_front()
    }

    /// The next packet that has arrived, without giving any buffer back.
    pub(super) fn next_without_refill(&mut self) -> Option<Packet> {
        self.guest.worker.run();
        self.take_packets();
        self.received.pop_front()
    }

    /// The next packet, which must be of this operation.
    pub(super) fn expect(&mut self, op: Op) -> Packet {
        let packet = self.next().unwrap_or_else(|| panic!("{op:?} was expected and nothing came"));
        assert_eq!(packet.op(), op, "{packet:?}");
        packet
    }

    /// Takes packets up to a reset. Only credit updates may come before it.
    pub(super) fn expect_reset(&mut self) {
        let next = std::iter::from_fn(|| self.next()).find(|packet| packet.op() != Op::CreditUpdate);
        assert_eq!(next.map(|packet| packet.op()), Some(Op::Rst));
    }

    /// Sends bytes as a packet.
    pub(super) fn send_raw(&mut self, header: &[u8], data: &[u8]) {
        self.post(header, data);
        self.kick_tx();
    }

    /// Adds a packet to the TX queue without publishing it.
    pub(super) fn post(&mut self, header: &[u8], data: &[u8]) {
        let addr = TX + TX_STEP * self.tx_next;
        self.tx_next = (self.tx_next + 1) % TX_BUFFERS;
        let memory = self.guest.ram.memory();
        memory.write_slice(header, GuestAddress(addr)).unwrap();
        memory.write_slice(data, GuestAddress(addr + 64)).unwrap();
        let mut buffers = vec![(addr, header.len() as u32)];
        // In two pieces, like a driver that sends pages.
        let middle = data.len() as u32 / 2;
        for (at, len) in [(0, middle), (middle, data.len() as u32 - middle)] {
            if len > 0 {
                buffers.push((addr + 64 + u64::from(at), len));
            }
        }
        self.tx.add(&buffers, &[]).expect("the queue has free descriptors");
    }

    /// Publishes the TX queue and kicks the device, which does not run before [`TestWorker::step`]
    /// or [`TestWorker::run`].
    pub(super) fn publish_tx(&mut self) {
        if self.tx.publish() {
            self.signal(1);
        }
    }

    /// Kicks a queue without running the device.
    pub(super) fn signal(&self, queue: u32) {
        let addresses = [MMIO + 0x50, BAR + 0x6000 + 4 * u64::from(queue)];
        let is_kick = addresses.into_iter().any(|at| self.guest.io_events.write(at, queue));
        assert!(is_kick, "the queue has an ioeventfd");
    }

    /// Publishes the TX queue, and runs the device.
    pub(super) fn kick_tx(&mut self) {
        self.publish_tx();
        self.guest.worker.run();
        while self.tx.take_used().is_some() {}
    }

    /// The header of a packet from this end.
    pub(super) fn header(end: &End, op: Op, flags: u32, len: u32) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID.into(),
            src_port: end.port.into(),
            dst_port: end.host_port.into(),
            len: len.into(),
            kind: (end.kind as u16).into(),
            op: (op as u16).into(),
            flags: flags.into(),
            buf_alloc: end.buf_alloc.into(),
            fwd_cnt: end.fwd_cnt.into(),
        }
    }

    /// Sends a packet without data.
    pub(super) fn send(&mut self, end: &End, op: Op, flags: u32) {
        self.send_raw(Self::header(end, op, flags, 0).as_bytes(), &[]);
    }

    pub(super) fn send_data(&mut self, end: &End, flags: u32, data: &[u8]) {
        self.send_raw(Self::header(end, Op::Rw, flags, data.len() as u32).as_bytes(), data);
    }

    /// The path of a socket of the device.
    pub(super) fn path(&self, suffix: &str) -> PathBuf {
        self.dir.path().join(format!("v{suffix}"))
    }

    /// A stream server on the host.
    pub(super) fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("_{port}"))).unwrap()
    }

    /// A host client that has sent its `CONNECT` line.
    pub(super) fn connect(&mut self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.path("")).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// A host client that has connected to the guest, with the guest's end.
    pub(super) fn open_by_host(&mut self, port: u32) -> (UnixStream, End) {
        let mut client = self.connect(port);
        let end = self.accept_request(1 << 18);
        assert_eq!(read(&mut client), format!("OK {}\n", end.host_port).as_bytes());
        (client, end)
    }

    /// Takes a connection request of the device. Returns the guest's end, without answering.
    pub(super) fn take_request(&mut self, buf_alloc: u32) -> End {
        let header = self.expect(Op::Request).header;
        let kind = SocketKind::of(header.kind.get()).expect("the device knows its socket types");
        let (port, host_port) = (header.dst_port.get(), header.src_port.get());
        End { port, host_port, kind, buf_alloc, fwd_cnt: 0 }
    }

    /// Takes a connection request of the device, and accepts it.
    pub(super) fn accept_request(&mut self, buf_alloc: u32) -> End {
        let end = self.take_request(buf_alloc);
        self.send(&end, Op::Response, 0);
        end
    }

    /// A connection that the guest opens to a host server.
    pub(super) fn open_by_guest(
        &mut self,
        server: &UnixListener,
        host_port: u32,
        port: u32,
    ) -> (UnixStream, End) {
        let end = End { port, host_port, kind: SocketKind::Stream, buf_alloc: 1 << 18, fwd_cnt: 0 };
        self.send(&end, Op::Request, 0);
        self.expect(Op::Response);
        let (peer, _) = server.accept().unwrap();
        peer.set_nonblocking(true).unwrap();
        (peer, end)
    }

    /// Saves the device, and restores it with sockets in another directory.
    pub(super) fn restored(mut self, kind: Kind, new_cid: Option<u32>) -> Rig {
        let mut state: TransportState = self.guest.save();
        let own: VsockState = state.common().device.decode().expect("the state is this device's");
        let dir = tempfile::tempdir().unwrap();
        let (sockets, files) = sockets(&dir);
        let (device, control) = Vsock::restore(&own, new_cid, sockets);
        let mut copy = Guest::with(kind, Box::new(device), self.guest.ram.clone(), TestWorker::new());
        copy.restore(&state).unwrap();
        (self.guest, self.control, self.dir) = (copy, control, dir);
        drop(std::mem::replace(&mut self.files, files));
        self
    }

    /// Takes an event, without returning its buffer.
    pub(super) fn take_event(&mut self) -> Option<[u8; 4]> {
        let used = self.events.take_used()?;
        assert_eq!(used.written, 4);
        let mut event = [0xff; 4];
        self.guest.ram.memory().read_slice(&mut event, GuestAddress(EVENTS)).unwrap();
        Some(event)
    }

    /// The driver handles a transport reset: takes the event and returns its buffer.
    pub(super) fn handle_reset(&mut self) {
        assert_eq!(self.take_event(), Some([0; 4]));
        self.give_event_buffer();
    }

    /// Returns the buffer of the event that was taken.
    pub(super) fn give_event_buffer(&mut self) {
        self.events.add(&[], &[(EVENTS, 4)]).unwrap();
        if self.events.publish() {
            self.guest.kick(2);
        }
        self.guest.worker.run();
    }
}

fn sockets(dir: &TempDir) -> (HostSockets, Vec<SocketFile>) {
    let (stream, stream_file) = Listener::bind(&dir.path().join("v"), SocketKind::Stream).unwrap();
    let (messages, messages_file) = Listener::bind(&dir.path().join("v.seq"), SocketKind::SeqPacket).unwrap();
    let sockets = HostSockets { listeners: vec![stream, messages], path: Some(dir.path().join("v")) };
    (sockets, vec![stream_file, messages_file])
}

/// Raises this process's limit of file descriptors for this number of connections. The test and the
/// device have one each for a connection.
pub(super) fn allow_connections(count: usize) {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Some(3 * count as u64).max(limit.current);
    let raised = Rlimit { current: limit.maximum.min(wanted).or(wanted), ..limit };
    setrlimit(Resource::Nofile, raised).unwrap();
    assert!(raised.current >= wanted, "{wanted:?} descriptors are needed, {:?} allowed", raised.current);
}

/// Reads all data that is there now.
pub(super) fn read(from: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut piece = vec![0; 65536];
    loop {
        match from.read(&mut piece) {
            Ok(0) | Err(_) => return all,
            Ok(len) => all.extend_from_slice(&piece[..len]),
        }
    }
}

/// Whether the stream is at its end.
pub(super) fn is_at_end(from: &mut UnixStream) -> bool {
    matches!(from.read(&mut [0]), Ok(0))
}

impl Rig {
    /// Makes a TX descriptor available that is outside of RAM.
    pub(super) fn break_tx(&mut self) {
        self.tx.set_descriptor(0, u64::MAX - 5, 10, 0, 0);
        let next = self.tx.used_idx();
        self.tx.set_avail_entry(next % SIZE, 0);
        self.tx.set_avail_idx(next.wrapping_add(1));
        self.guest.kick(1);
    }
}

/// A driver on its own thread that adds a tiny RX buffer for each one that the device discards,
/// until this is dropped.
pub(super) struct TinyBuffers {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Rig {
    /// Gives the device tiny RX buffers only. It must have used all the others.
    pub(super) fn give_tiny_buffers(&mut self) -> TinyBuffers {
        // If the device had no bound, the test would fail at this number, and not hang.
        const MAX_DISCARDED: u64 = 1 << 20;
        let spare = DriverQueue::new(&self.guest.ram, UNUSED_QUEUE, SIZE, 0);
        let queue = std::mem::replace(&mut self.rx, spare);
        queue.set_descriptor(0, RX, 10, WRITE, 0);
        (0..SIZE).for_each(|slot| queue.set_avail_entry(slot, 0));
        let (taken, control) = (queue.used_idx(), self.control.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        // The available ring is always full.
        let refill = move || {
            let discarded = control.stats().malformed_count.get();
            queue.set_avail_idx(taken.wrapping_add(discarded as u16).wrapping_add(SIZE));
            discarded < MAX_DISCARDED && !stopped.load(Ordering::Relaxed)
        };
        refill();
        TinyBuffers { stop, thread: Some(thread::spawn(move || while refill() {})) }
    }
}

impl Drop for TinyBuffers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(thread::JoinHandle::join);
    }
}
