//! The guest's side for tests and the fuzzer: a network stack as client, and raw TCP segments.

#![cfg_attr(not(test), allow(dead_code, reason = "the fuzzer uses a part of it"))]

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use config::{MmdsConfig, MmdsVersion};
use serde_json::Value;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpCidr, IpProtocol, Ipv4Packet, Ipv4Repr,
    TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, TcpTimestampRepr,
};

use super::{Stack, instant, link};
use crate::{Service, SharedStore};

pub(crate) const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);
pub(crate) const GUEST_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 7]);
pub(crate) const MAX_STORE: usize = 51200;

/// A service with these contents.
pub(crate) fn service(version: MmdsVersion, contents: Value) -> Arc<Service> {
    let store = SharedStore::new(MAX_STORE);
    store.put(contents).expect("contents fit");
    let config = MmdsConfig {
        version,
        network_interfaces: vec!["eth0".into()],
        ipv4_address: None,
        imds_compat: false,
    };
    Service::new(config, store, "vm", &[1; 32])
}

/// What the simulated cable does with a frame.
pub(crate) enum Fate {
    Delivered,
    Lost,
    Duplicated,
    /// Delivered after the next frame.
    Delayed,
}

/// A guest with its own network stack, and the cable between it and the service.
pub(crate) struct Guest {
    interface: Interface,
    nic: GuestNic,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) stack: Stack,
    pub(crate) now: Duration,
    next_port: u16,
}

impl Guest {
    pub(crate) fn new(service: &Arc<Service>, address: Ipv4Addr, mtu: usize) -> Guest {
        let now = Duration::from_secs(1000);
        let mut nic = GuestNic { mtu, received: VecDeque::new(), sent: VecDeque::new() };
        let mut config = Config::new(GUEST_MAC.into());
        config.random_seed = 42;
        let mut interface = Interface::new(config, &mut nic, instant(now));
        interface.update_ip_addrs(|a| a.push(IpCidr::new(address.into(), 0)).unwrap());
        let stack = Stack::new(Arc::clone(service), mtu as u16, 7, now);
        Guest { interface, nic, sockets: SocketSet::new(vec![]), stack, now, next_port: 40000 }
    }

    pub(crate) fn connect(&mut self) -> SocketHandle {
        self.connect_to(80)
    }

    pub(crate) fn connect_to(&mut self, port: u16) -> SocketHandle {
        let buffer = |len| SocketBuffer::new(vec![0; len]);
        let mut socket = Socket::new(buffer(8192), buffer(8192));
        self.next_port += 1;
        socket.connect(self.interface.context(), (SERVICE, port), self.next_port).unwrap();
        self.sockets.add(socket)
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(crate) fn state(&mut self, handle: SocketHandle) -> State {
        self.socket(handle).state()
    }

    /// Advances the time by a millisecond and transfers frames in both directions.
    pub(crate) fn step(&mut self, mut fate: impl FnMut() -> Fate) {
        self.now += Duration::from_millis(1);
        self.interface.poll(instant(self.now), &mut self.nic, &mut self.sockets);
        for frame in transmit(self.nic.sent.drain(..), &mut fate) {
            if self.stack.wants(&frame[..frame.len().min(64)]) {
                self.stack.push(&frame, self.now);
            }
        }
        let (mut frames, mut frame) = (Vec::new(), Vec::new());
        while self.stack.pop(&mut frame, self.now) {
            assert!(frame.len() <= self.nic.mtu + 14, "{}", frame.len());
            frames.push(std::mem::take(&mut frame));
        }
        self.nic.received.extend(transmit(frames.into_iter(), &mut fate));
    }

    /// Steps until `done`; panics after `limit`.
    pub(crate) fn until(&mut self, limit: Duration, mut done: impl FnMut(&mut Guest) -> bool) {
        let end = self.now + limit;
        while !done(self) {
            assert!(self.now < end, "not done within {limit:?}");
            self.step(|| Fate::Delivered);
        }
    }

    /// Sends a request on a new connection and reads until the service closes it.
    pub(crate) fn request(&mut self, request: &str) -> String {
        self.request_over(request, || Fate::Delivered, |_| false)
    }

    /// As `request`, over a bad cable. Reads until `is_whole` or the service closes the connection.
    pub(crate) fn request_over(
        &mut self,
        request: &str,
        mut fate: impl FnMut() -> Fate,
        is_whole: impl Fn(&[u8]) -> bool,
    ) -> String {
        let handle = self.connect();
        let (mut rest, mut response) = (request.as_bytes(), Vec::new());
        let end = self.now + Duration::from_mins(10);
        loop {
            assert!(self.now < end, "the response has no end: {} bytes so far", response.len());
            self.step(&mut fate);
            let socket = self.socket(handle);
            if socket.can_send() && !rest.is_empty() {
                rest = &rest[socket.send_slice(rest).unwrap()..];
            }
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), response.extend_from_slice(bytes))).unwrap();
            }
            let is_open = socket.may_recv() || matches!(socket.state(), State::SynSent | State::SynReceived);
            if !is_open || is_whole(&response) {
                socket.close();
                return String::from_utf8(response).unwrap();
            }
        }
    }
}

fn transmit(frames: impl Iterator<Item = Vec<u8>>, fate: &mut impl FnMut() -> Fate) -> Vec<Vec<u8>> {
    let (mut out, mut late) = (Vec::new(), None);
    for frame in frames {
        match fate() {
            Fate::Lost => {}
            Fate::Duplicated => out.extend([frame.clone(), frame]),
            Fate::Delivered => out.push(frame),
            Fate::Delayed => {
                out.extend(late.replace(frame));
                continue;
            }
        }
        out.extend(late.take());
    }
    out.extend(late);
    out
}

/// The guest's network device.
struct GuestNic {
    mtu: usize,
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

impl phy::Device for GuestNic {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.received.pop_front()?;
        Some((Rx(frame), Tx(&mut self.sent)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities
    }
}

struct Rx(Vec<u8>);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = vec![0; len];
        let result = write(&mut frame);
        self.0.push_back(frame);
        result
    }
}

/// A TCP segment with any fields.
#[derive(Debug, Clone)]
pub(crate) struct RawSegment<'a> {
    pub(crate) from: (Ipv4Addr, u16),
    pub(crate) to_port: u16,
    pub(crate) control: TcpControl,
    pub(crate) seq: u32,
    pub(crate) ack: Option<u32>,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) timestamp: Option<(u32, u32)>,
    pub(crate) payload: &'a [u8],
}

impl Default for RawSegment<'_> {
    fn default() -> Self {
        RawSegment {
            from: (GUEST, 50000),
            to_port: 80,
            control: TcpControl::None,
            seq: 0,
            ack: None,
            window: 60000,
            mss: None,
            window_scale: None,
            timestamp: None,
            payload: &[],
        }
    }
}

impl RawSegment<'_> {
    /// The frame of this segment. It has no TCP checksum, as guests offload it to their device.
    pub(crate) fn frame(&self) -> Vec<u8> {
        let tcp = TcpRepr {
            src_port: self.from.1,
            dst_port: self.to_port,
            control: self.control,
            seq_number: TcpSeqNumber(self.seq.cast_signed()),
            ack_number: self.ack.map(|ack| TcpSeqNumber(ack.cast_signed())),
            window_len: self.window,
            window_scale: self.window_scale,
            max_seg_size: self.mss,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: self.timestamp.map(|(val, ecr)| TcpTimestampRepr::new(val, ecr)),
            payload: self.payload,
        };
        let ip = Ipv4Repr {
            src_addr: self.from.0,
            dst_addr: SERVICE,
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let mut frame = vec![0; link::ETHERNET_LEN + ip.buffer_len() + tcp.buffer_len()];
        EthernetRepr { src_addr: GUEST_MAC, dst_addr: link::SERVICE_MAC, ethertype: EthernetProtocol::Ipv4 }
            .emit(&mut EthernetFrame::new_unchecked(&mut frame));
        let checksums = ChecksumCapabilities::default();
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[link::ETHERNET_LEN..]), &checksums);
        let start = link::ETHERNET_LEN + ip.buffer_len();
        let ignored = ChecksumCapabilities::ignored();
        let (from, to) = (self.from.0.into(), SERVICE.into());
        tcp.emit(&mut TcpPacket::new_unchecked(&mut frame[start..]), &from, &to, &ignored);
        frame
    }
}

/// A TCP segment from the service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SentSegment {
    pub(crate) to: (EthernetAddress, Ipv4Addr, u16),
    pub(crate) from_port: u16,
    pub(crate) control: TcpControl,
    pub(crate) seq: u32,
    pub(crate) ack: Option<u32>,
    pub(crate) payload: Vec<u8>,
}

/// All segments that the stack sends now. Asserts that they are TCP with valid checksums.
pub(crate) fn sent_segments(stack: &mut Stack, now: Duration) -> Vec<SentSegment> {
    let (mut out, mut frame) = (Vec::new(), Vec::new());
    while stack.pop(&mut frame, now) {
        out.push(read(&frame));
        frame.clear();
    }
    out
}

pub(crate) fn read(frame: &[u8]) -> SentSegment {
    let ethernet = EthernetFrame::new_checked(frame).unwrap();
    assert_eq!(ethernet.src_addr(), link::SERVICE_MAC);
    assert_eq!(ethernet.ethertype(), EthernetProtocol::Ipv4);
    let packet = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
    let checksums = ChecksumCapabilities::default();
    let ip = Ipv4Repr::parse(&packet, &checksums).unwrap();
    assert_eq!(ip.src_addr, SERVICE);
    let tcp = TcpPacket::new_checked(packet.payload()).unwrap();
    let tcp = TcpRepr::parse(&tcp, &ip.src_addr.into(), &ip.dst_addr.into(), &checksums).unwrap();
    SentSegment {
        to: (ethernet.dst_addr(), ip.dst_addr, tcp.dst_port),
        from_port: tcp.src_port,
        control: tcp.control,
        seq: tcp.seq_number.0.cast_unsigned(),
        ack: tcp.ack_number.map(|ack| ack.0.cast_unsigned()),
        payload: tcp.payload.to_vec(),
    }
}
