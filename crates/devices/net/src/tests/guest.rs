//! A guest with one network device: a driver on a transport, on a worker that the test steps, and
//! the other end of its network.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use vm_memory::{Bytes, GuestAddress};

use crate::backend::tap::Tap;
use crate::{Net, NetBackend, NetConfig, NetControl, NetSetup, NetState};
use virtio::device::feature;
use virtio::rate_limiter::RateLimiterConfig;
use virtio::testing::{DriverQueue, Guest, Kind, RUNNING, TestWorker, guest_ram};
use virtio::transport::{RestoreError, Status};

/// MAC address of the guest.
pub(super) const MAC: [u8; 6] = [0x06, 0, 0xac, 0x10, 0, 2];
/// Size of guest memory in MiB.
const RAM_MIB: u32 = 16;
/// Address of the queues, and the bytes of each.
const QUEUES: u64 = 0x1000;
const QUEUE_BYTES: u64 = 0x4000;
/// Address range of the frames in the transmit queue.
const TX_ARENA: u64 = 8 << 20;
const TX_END: u64 = 16 << 20;
/// Address of the receive buffers.
const RX_ARENA: u64 = 1 << 20;

/// A frame of `len` bytes from the guest. Its contents depend on `seed`.
pub(super) fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    frame[6..12].copy_from_slice(&MAC);
    frame
}

/// A frame that the guest received, with its header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RxFrame {
    pub(super) header: Vec<u8>,
    pub(super) frame: Vec<u8>,
    /// Number of buffers that it filled.
    pub(super) buffers: u16,
}

pub(super) struct NetGuest {
    pub(super) guest: Guest,
    pub(super) control: NetControl,
    /// Receive queue and transmit queue of each pair, then the control queue.
    pub(super) queues: Vec<DriverQueue>,
    /// The network end of each pair.
    pub(super) peers: Vec<OwnedFd>,
    /// Receive buffers that the device has: head, address, length.
    posted: Vec<(u16, u64, u32)>,
    next_rx: u64,
    next_tx: u64,
    pub(super) features: u64,
}

pub(super) fn config(pairs: u16) -> NetConfig {
    NetConfig { id: "eth0".into(), mac: Some(MAC), mtu: Some(1500), pairs, queue_size: 64 }
}

/// A fake tap, and the peer of each of its queues.
pub(super) fn fake_tap(pairs: u16) -> (Tap, Vec<OwnedFd>) {
    let pair = |_| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    };
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..pairs).map(pair).unzip();
    (Tap::fake(ours), theirs)
}

impl NetGuest {
    pub(super) fn new(kind: Kind) -> Self {
        Self::with(kind, config(1), RateLimiterConfig::default(), RateLimiterConfig::default(), u64::MAX)
    }

    /// A guest whose driver accepts the offered features that are in `accepts`.
    pub(super) fn with(
        kind: Kind,
        config: NetConfig,
        rx: RateLimiterConfig,
        tx: RateLimiterConfig,
        accepts: u64,
    ) -> Self {
        let (tap, peers) = fake_tap(config.pairs);
        let setup = NetSetup { backend: NetBackend::tap(tap), interceptor: None };
        let (net, control) = Net::new(config, setup, rx, tx, 1).unwrap();
        Self::with_device(kind, net, control, peers, accepts)
    }

    pub(super) fn with_device(
        kind: Kind,
        net: Net,
        control: NetControl,
        peers: Vec<OwnedFd>,
        accepts: u64,
    ) -> Self {
        let guest = Guest::with(kind, Box::new(net), guest_ram(RAM_MIB), TestWorker::new());
        let mut guest = NetGuest {
            guest,
            control,
            queues: vec![],
            peers,
            posted: vec![],
            next_rx: RX_ARENA,
            next_tx: TX_ARENA,
            features: 0,
        };
        guest.start(accepts);
        guest
    }

    /// Starts a driver on all queues.
    pub(super) fn start(&mut self, accepts: u64) {
        self.start_exactly(accepts | feature::VERSION_1);
    }

    /// Like [`NetGuest::start`], with `VERSION_1` only if it is in `accepts`.
    pub(super) fn start_exactly(&mut self, accepts: u64) {
        let guest = &mut self.guest;
        guest.reset();
        guest.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        self.features = guest.device_features() & accepts;
        guest.set_driver_features(self.features);
        guest.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        let pairs = if self.features & 1 << 22 == 0 { 1 } else { self.peers.len() };
        self.queues.clear();
        self.posted.clear();
        for index in 0..=2 * pairs {
            let base = QUEUES + QUEUE_BYTES * index as u64;
            let driver = DriverQueue::new(&guest.ram, base, 64, self.features);
            guest.select_queue(index as u16);
            guest.set_up_queue(&driver.state());
            guest.map_vectors();
            self.queues.push(driver);
        }
        guest.set_status(RUNNING);
        guest.worker.run();
    }

    /// Saves the guest and restores it with another network and MAC address.
    pub(super) fn restore(
        &mut self,
        mac: Option<[u8; 6]>,
        setup: NetSetup,
        peers: Vec<OwnedFd>,
    ) -> Result<(), RestoreError> {
        let state = self.guest.save();
        let (copy, control) = Net::restore(&self.state(), mac, setup, 1).unwrap();
        let kind = self.guest.kind();
        self.guest = Guest::with(kind, Box::new(copy), self.guest.ram.clone(), TestWorker::new());
        (self.control, self.peers) = (control, peers);
        self.guest.restore(&state)
    }

    /// The saved state of the device.
    pub(super) fn state(&mut self) -> NetState {
        self.guest.save().common().device.decode().expect("the state is this device's")
    }

    /// The status field of the configuration space.
    pub(super) fn status(&mut self) -> u16 {
        let mut status = [0; 2];
        self.guest.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }

    /// Adds a receive buffer of these parts to queue pair `pair`. False: the queue is full.
    pub(super) fn add_rx_buffer(&mut self, pair: usize, parts: &[u32]) -> bool {
        let len: u32 = parts.iter().sum();
        if self.next_rx + u64::from(len) > TX_ARENA {
            self.next_rx = RX_ARENA;
        }
        let mut at = self.next_rx;
        let buffers: Vec<_> = parts
            .iter()
            .map(|&len| {
                at += u64::from(len);
                (at - u64::from(len), len)
            })
            .collect();
        let Some(head) = self.queues[2 * pair].add(&[], &buffers) else { return false };
        self.posted.push((head, self.next_rx, len));
        self.next_rx = at;
        true
    }

    /// Adds a receive buffer and kicks the queue if the device asked for it.
    pub(super) fn post_rx_buffer(&mut self, parts: &[u32]) {
        assert!(self.add_rx_buffer(0, parts));
        self.publish(0);
    }

    /// Publishes the added buffers of a queue. True: the device asked for a kick and got it.
    pub(super) fn publish(&mut self, queue: usize) -> bool {
        let kick = self.queues[queue].publish();
        if kick {
            self.guest.kick(queue as u32);
        } else {
            self.guest.worker.run();
        }
        kick
    }

    /// The next frame that queue pair `pair` received.
    pub(super) fn received_on(&mut self, pair: usize) -> Option<RxFrame> {
        let mut bytes = Vec::new();
        // The number of buffers is unknown until the header is complete.
        let mut wanted = None;
        let mut buffers = 0;
        while wanted.is_none_or(|wanted| buffers < wanted) {
            let used = self.queues[2 * pair].take_used();
            assert!(used.is_some() || buffers == 0, "all buffers of a frame are used at once");
            let used = used?;
            let at = self.posted.iter().position(|&(head, ..)| head == used.head).unwrap();
            let (_, addr, len) = self.posted.remove(at);
            assert!(used.written <= len);
            let mut part = vec![0; used.written as usize];
            self.guest.ram.memory().read_slice(&mut part, GuestAddress(addr)).unwrap();
            bytes.extend(part);
            if wanted.is_none() && bytes.len() >= 12 {
                wanted = Some(u16::from_le_bytes([bytes[10], bytes[11]]));
            }
            buffers += 1;
        }
        let frame = bytes.split_off(12);
        Some(RxFrame { header: bytes, frame, buffers })
    }

    /// The next frame that the first pair received.
    pub(super) fn received(&mut self) -> Option<Vec<u8>> {
        self.received_on(0).map(|rx| rx.frame)
    }

    /// Adds a frame to the transmit queue of pair `pair`, in buffers of the lengths `cuts` and one
    /// for the rest. False: the queue is full.
    pub(super) fn send_on(&mut self, pair: usize, header: [u8; 12], frame: &[u8], cuts: &[usize]) -> bool {
        let bytes = [&header[..], frame].concat();
        if self.next_tx + bytes.len() as u64 > TX_END {
            self.next_tx = TX_ARENA;
        }
        let base = self.next_tx;
        self.next_tx += bytes.len() as u64;
        self.guest.ram.memory().write_slice(&bytes, GuestAddress(base)).unwrap();
        let (mut at, mut buffers) = (0, Vec::new());
        for &cut in cuts {
            let len = cut.min(bytes.len() - at);
            if len > 0 {
                buffers.push((base + at as u64, len as u32));
            }
            at += len;
        }
        if at < bytes.len() {
            buffers.push((base + at as u64, (bytes.len() - at) as u32));
        }
        self.queues[2 * pair + 1].add(&buffers, &[]).is_some()
    }

    /// Sends a frame, after it has taken the used buffers of earlier ones.
    pub(super) fn send(&mut self, frame: &[u8]) {
        while self.queues[1].take_used().is_some() {}
        assert!(self.send_on(0, [0; 12], frame, &[12]));
        self.publish(1);
    }

    /// The next header and frame that the network got from pair `pair`.
    pub(super) fn sent_on(&self, pair: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        match rustix::net::recv(&self.peers[pair], &mut bytes[..], RecvFlags::empty()) {
            Ok((len, _)) => {
                bytes.truncate(len);
                Some(bytes)
            }
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                None
            }
        }
    }

    /// The next frame that the network got.
    pub(super) fn sent(&self) -> Option<Vec<u8>> {
        self.sent_on(0).map(|mut bytes| bytes.split_off(12))
    }

    /// The network has a frame for the guest.
    pub(super) fn arrive(&mut self, frame: &[u8]) {
        assert!(self.arrive_on(0, [0; 12], frame));
    }

    /// The network has a frame for the guest, with this header. False: its queue is full.
    pub(super) fn arrive_on(&mut self, pair: usize, header: [u8; 12], frame: &[u8]) -> bool {
        let bytes = [&header[..], frame].concat();
        let sent = rustix::net::send(self.peers[pair].as_fd(), &bytes, SendFlags::empty());
        self.guest.worker.run();
        sent.is_ok()
    }

    /// Sends a command on the control queue, and returns its status.
    pub(super) fn command(&mut self, command: &[u8]) -> u8 {
        let last = self.queues.len() - 1;
        let at = TX_ARENA - 0x1000;
        let memory = self.guest.ram.memory();
        memory.write_slice(command, GuestAddress(at)).unwrap();
        memory.write_slice(&[0xff], GuestAddress(at + 0x800)).unwrap();
        self.queues[last].add(&[(at, command.len() as u32)], &[(at + 0x800, 1)]).unwrap();
        self.publish(last);
        let used = self.queues[last].take_used().expect("a command completes");
        assert_eq!(used.written, 1);
        self.guest.ram.memory().read_obj(GuestAddress(at + 0x800)).unwrap()
    }
}
