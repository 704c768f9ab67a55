//! A guest with a vsock driver that does what a test tells it, and its host.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromZeros, IntoBytes};

use crate::packet::{HEADER_LEN, HOST_CID, Header, Op, SocketKind};
use crate::listener::{HostSockets, Listener, SocketFile};
use crate::{Vsock, VsockControl};
use virtio::testing::{DriverQueue, Guest, Kind, RUNNING, TestWorker, TransportState, WRITE, guest_ram};

pub(super) const MS: u64 = 1_000_000;
pub(super) const CID: u64 = 3;
const SIZE: u16 = 256;
const QUEUES: [u64; 3] = [0x1_0000, 0x2_0000, 0x3_0000];
const EVENTS: u64 = 0x4_0000;
const TX: u64 = 0x5_0000;
/// Each of the guest's packets has its place, so that several can be out.
const TX_STEP: u64 = 0x2_0000;
const TX_PLACES: u64 = 16;
const RX: u64 = 0x30_0000;
const RX_STEP: u64 = 0x2000;

/// A packet that the guest got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Got {
    pub(super) header: Header,
    pub(super) data: Vec<u8>,
}

impl Got {
    pub(super) fn op(&self) -> Op {
        Op::of(self.header.op.get()).expect("the device knows its operations")
    }

    pub(super) fn flags(&self) -> u32 {
        self.header.flags.get()
    }
}

/// The guest's end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub(super) port: u32,
    pub(super) host_port: u32,
    pub(super) kind: SocketKind,
    /// What it says about its room.
    pub(super) room: u32,
    pub(super) forwarded: u32,
}

/// What the tests' machine is made of.
pub(super) struct Rig {
    pub(super) guest: Guest,
    pub(super) control: VsockControl,
    rx: DriverQueue,
    tx: DriverQueue,
    pub(super) events: DriverQueue,
    /// Bytes of each buffer for packets.
    rx_len: u32,
    /// Buffers that the guest gives the device: their places, by head.
    rx_out: VecDeque<(u16, u64)>,
    rx_free: Vec<u64>,
    tx_next: u64,
    got: VecDeque<Got>,
    dir: TempDir,
    files: Vec<SocketFile>,
}

impl Rig {
    pub(super) fn new(kind: Kind) -> Rig {
        Rig::with(kind, 64, 4096 + HEADER_LEN)
    }

    /// With that many buffers of that size for the device's packets.
    pub(super) fn with(kind: Kind, buffers: u64, rx_len: u32) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let (sockets, files) = sockets(&dir);
        let (device, control) = Vsock::new(CID as u32, sockets);
        let guest = Guest::with(kind, Box::new(device), guest_ram(8), TestWorker::new());
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
            got: VecDeque::new(),
            dir,
            files,
        };
        rig.start();
        rig
    }

    /// What a driver does at its beginning.
    pub(super) fn start(&mut self) {
        self.rx_free.extend(self.rx_out.drain(..).map(|(_, place)| place));
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

    /// Gives the device all free buffers.
    pub(super) fn give_buffers(&mut self) {
        while let Some(place) = self.rx_free.pop() {
            let (header, data) =
                ((place, HEADER_LEN), (place + u64::from(HEADER_LEN), self.rx_len - HEADER_LEN));
            // Half of the drivers have one buffer for both, the others two.
            let head = if place & RX_STEP == 0 {
                self.rx.add(&[], &[header, data])
            } else {
                self.rx.add(&[], &[(place, self.rx_len)])
            };
            self.rx_out.push_back((head.expect("the queue has room"), place));
        }
        if self.rx.publish() {
            self.guest.kick(0);
        }
    }

    /// Takes the packets that came, and keeps their buffers.
    fn take_packets(&mut self) {
        while let Some(used) = self.rx.take_used() {
            let at = self.rx_out.iter().position(|(head, _)| *head == used.head).unwrap();
            let (_, place) = self.rx_out.remove(at).unwrap();
            self.rx_free.push(place);
            assert!(used.written >= HEADER_LEN, "a packet has a header");
            let mut header = Header::new_zeroed();
            self.guest.ram.memory().read_slice(header.as_mut_bytes(), GuestAddress(place)).unwrap();
            assert_eq!(header.len.get(), used.written - HEADER_LEN, "the length is that of the data");
            let mut data = vec![0; header.len.get() as usize];
            let at = GuestAddress(place + u64::from(HEADER_LEN));
            self.guest.ram.memory().read_slice(&mut data, at).unwrap();
            self.got.push_back(Got { header, data });
        }
    }

    /// The next packet, if there is one; the device gets its buffer back only with the next one that is asked for.
    pub(super) fn next(&mut self) -> Option<Got> {
        self.guest.worker.run();
        self.take_packets();
        if self.got.is_empty() {
            self.give_buffers();
            self.guest.worker.run();
            self.take_packets();
        }
        self.got.pop_front()
    }

    /// What came without giving buffers back.
    pub(super) fn next_without_refill(&mut self) -> Option<Got> {
        self.guest.worker.run();
        self.take_packets();
        self.got.pop_front()
    }

    /// The next packet, which is of this kind.
    pub(super) fn expect(&mut self, op: Op) -> Got {
        let got = self.next().unwrap_or_else(|| panic!("{op:?} was expected and nothing came"));
        assert_eq!(got.op(), op, "{got:?}");
        got
    }

    /// The reset that comes next, after any news of credit.
    pub(super) fn expect_reset(&mut self) {
        let next = std::iter::from_fn(|| self.next()).find(|packet| packet.op() != Op::CreditUpdate);
        assert_eq!(next.map(|packet| packet.op()), Some(Op::Rst));
    }

    /// Sends bytes as a packet.
    pub(super) fn send_raw(&mut self, header: &[u8], data: &[u8]) {
        self.post(header, data);
        self.kick_tx();
    }

    /// Puts a packet in the queue, unseen by the device so far.
    pub(super) fn post(&mut self, header: &[u8], data: &[u8]) {
        let place = TX + TX_STEP * self.tx_next;
        self.tx_next = (self.tx_next + 1) % TX_PLACES;
        let memory = self.guest.ram.memory();
        memory.write_slice(header, GuestAddress(place)).unwrap();
        memory.write_slice(data, GuestAddress(place + 64)).unwrap();
        let mut buffers = vec![(place, header.len() as u32)];
        // Two pieces, as a driver has them that sends pages.
        let middle = data.len() as u32 / 2;
        for (at, len) in [(0, middle), (middle, data.len() as u32 - middle)] {
            if len > 0 {
                buffers.push((place + 64 + u64::from(at), len));
            }
        }
        self.tx.add(&buffers, &[]).expect("the queue has room");
    }

    /// Shows the device what was put in the queue, and lets it do nothing yet.
    pub(super) fn publish_tx(&mut self) {
        if self.tx.publish() {
            self.guest.kick(1);
        }
    }

    /// Shows the device what was put in the queue.
    pub(super) fn kick_tx(&mut self) {
        self.publish_tx();
        self.guest.worker.run();
        while self.tx.take_used().is_some() {}
    }

    /// The header of a packet of this end.
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
            buf_alloc: end.room.into(),
            fwd_cnt: end.forwarded.into(),
        }
    }

    pub(super) fn send(&mut self, end: &End, op: Op, flags: u32) {
        self.send_raw(Self::header(end, op, flags, 0).as_bytes(), &[]);
    }

    pub(super) fn send_data(&mut self, end: &End, flags: u32, data: &[u8]) {
        self.send_raw(Self::header(end, Op::Rw, flags, data.len() as u32).as_bytes(), data);
    }

    /// Where the device's sockets are.
    pub(super) fn path(&self, suffix: &str) -> PathBuf {
        self.dir.path().join(format!("v{suffix}"))
    }

    /// A server on the host.
    pub(super) fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("_{port}"))).unwrap()
    }

    /// A client on the host that has said where it wants to go.
    pub(super) fn dial(&mut self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.path("")).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// A connection that a client on the host opened and the guest took.
    pub(super) fn open_by_host(&mut self, port: u32) -> (UnixStream, End) {
        let mut client = self.dial(port);
        let asked = self.expect(Op::Request);
        let end = End {
            port,
            host_port: asked.header.src_port.get(),
            kind: SocketKind::Stream,
            room: 1 << 18,
            forwarded: 0,
        };
        self.send(&end, Op::Response, 0);
        assert_eq!(read(&mut client), format!("OK {}\n", end.host_port).as_bytes());
        (client, end)
    }

    /// A connection that the guest opened to a server on the host.
    pub(super) fn open_by_guest(
        &mut self,
        server: &UnixListener,
        host_port: u32,
        port: u32,
    ) -> (UnixStream, End) {
        let end = End { port, host_port, kind: SocketKind::Stream, room: 1 << 18, forwarded: 0 };
        self.send(&end, Op::Request, 0);
        self.expect(Op::Response);
        let (peer, _) = server.accept().unwrap();
        peer.set_nonblocking(true).unwrap();
        (peer, end)
    }

    /// Saves the device, and makes it again with sockets of its own.
    pub(super) fn restored(mut self, kind: Kind, new_cid: Option<u32>) -> Rig {
        let mut state: TransportState = self.guest.save();
        let own: crate::VsockState = state.common().device.decode().expect("the state is this device's");
        let dir = tempfile::tempdir().unwrap();
        let (sockets, files) = sockets(&dir);
        let (device, control) = Vsock::restore(&own, new_cid, sockets);
        let mut copy = Guest::with(kind, Box::new(device), self.guest.ram.clone(), TestWorker::new());
        copy.restore(&state).unwrap();
        (self.guest, self.control, self.dir) = (copy, control, dir);
        drop(std::mem::replace(&mut self.files, files));
        self
    }

    /// The driver takes an event and gives its buffer back.
    pub(super) fn take_event(&mut self) -> Option<[u8; 4]> {
        let used = self.events.take_used()?;
        assert_eq!(used.written, 4);
        let mut event = [0xff; 4];
        self.guest.ram.memory().read_slice(&mut event, GuestAddress(EVENTS)).unwrap();
        Some(event)
    }

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

/// Lets this process have so many connections, each of which is two descriptors of it.
pub(super) fn allow_connections(count: usize) {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Some(3 * count as u64).max(limit.current);
    let raised = Rlimit { current: limit.maximum.min(wanted).or(wanted), ..limit };
    setrlimit(Resource::Nofile, raised).unwrap();
    assert!(raised.current >= wanted, "{wanted:?} descriptors are needed, {:?} allowed", raised.current);
}

/// All that is there now.
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

/// Whether the stream is at its end: nothing is left, and nothing will come.
pub(super) fn is_at_end(from: &mut UnixStream) -> bool {
    matches!(from.read(&mut [0]), Ok(0))
}

impl Rig {
    /// Makes a descriptor available that is nowhere.
    pub(super) fn break_tx(&mut self) {
        self.tx.set_descriptor(0, u64::MAX - 5, 10, 0, 0);
        let next = self.tx.used_idx();
        self.tx.set_avail_entry(next % SIZE, 0);
        self.tx.set_avail_idx(next.wrapping_add(1));
        self.guest.kick(1);
    }
}

impl Rig {
    /// Puts data in the queue and shows it, while the device is not looking.
    pub(super) fn post_data(&mut self, end: &End, data: &[u8]) {
        self.post(Self::header(end, Op::Rw, 0, data.len() as u32).as_bytes(), data);
        self.kick_tx();
    }
}

/// A driver that makes a buffer without room available for each that the device throws away, until this is dropped or it has made very many.
pub(super) struct TinyBuffers {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Rig {
    /// From now on the device gets tiny buffers only. It has taken all that it was given before.
    pub(super) fn give_tiny_buffers(&mut self) -> TinyBuffers {
        const MOST: u64 = 1 << 20;
        let spare = DriverQueue::new(&self.guest.ram, 0x7_0000, SIZE, 0);
        let queue = std::mem::replace(&mut self.rx, spare);
        queue.set_descriptor(0, RX, 10, WRITE, 0);
        (0..SIZE).for_each(|slot| queue.set_avail_entry(slot, 0));
        let (taken, control) = (queue.used_idx(), self.control.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        // As many as the queue has are out, always.
        let refill = move || {
            let thrown_away = control.stats().malformed_count.get();
            queue.set_avail_idx(taken.wrapping_add(thrown_away as u16).wrapping_add(SIZE));
            thrown_away < MOST && !stopped.load(Ordering::Relaxed)
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
