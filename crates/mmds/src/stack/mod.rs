//! The network stack of one interface: frames from the guest in, frames to the guest out.
//!
//! The network device calls, from one thread at a time:
//!
//! - [`wants`](Stack::wants) for each frame of the guest, and [`push`](Stack::push) if it is true;
//! - then [`pop`](Stack::pop) until it returns false, and again at [`deadline`](Stack::deadline).
//!
//! Time is any monotonic clock, the same for all stacks of a service.
//!
//! Ethernet and ARP are in [`link`]; `smoltcp` does IPv4 and TCP. No socket listens permanently.
//! The first segment of a connection creates a socket, if a slot is free. So the memory of an
//! interface whose guest never connects is next to nothing.

mod connection;
mod device;
mod link;

#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpProtocol, Ipv4Packet,
    TcpPacket,
};

#[cfg(any(test, feature = "testing"))]
use crate::http;
use crate::service::Service;
use connection::{Connection, listener};
use device::PacketDevice;

/// Most connections of one interface at a time.
pub const MAX_CONNECTIONS: usize = 30;

/// Time without progress after which a connection may be dropped for a new one, if there are
/// [`MAX_CONNECTIONS`].
pub const EVICTION_AGE: Duration = Duration::from_secs(1);

/// TCP port of the service.
const PORT: u16 = 80;

/// Smallest MTU that IPv4 allows.
const MIN_MTU: u16 = 68;
/// Largest MTU used: larger packets have no benefit here.
const MAX_MTU: u16 = 1500;

/// Network stack of one interface, with its connections to the service.
pub struct Stack {
    service: Arc<Service>,
    address: Ipv4Addr,
    device: PacketDevice,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
}

/// The fields of a TCP segment that matter before `smoltcp` processes it.
struct Segment {
    from: IpEndpoint,
    /// Whether the segment opens a connection to the service.
    opens: bool,
}

impl Stack {
    /// The stack of a network interface, if its guest reaches `service` through it.
    pub fn for_interface(
        service: &Arc<Service>,
        iface_id: &str,
        mtu: Option<u16>,
        now: Duration,
    ) -> Option<Stack> {
        if !service.config().network_interfaces.iter().any(|id| id == iface_id) {
            return None;
        }
        Some(Stack::new(Arc::clone(service), mtu.unwrap_or(u16::MAX), service.new_seed(), now))
    }

    /// The stack of an interface with this `mtu`. `seed` is random; TCP sequence numbers derive
    /// from it.
    pub(crate) fn new(service: Arc<Service>, mtu: u16, seed: u64, now: Duration) -> Stack {
        let address = service.config().address();
        let mtu = mtu.clamp(MIN_MTU, MAX_MTU);
        let mut device = PacketDevice::new(mtu.into(), Arc::clone(&service));
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut device, instant(now));
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(address.into(), 32)).expect("there is space for one address");
        });
        Stack {
            service,
            address,
            device,
            interface,
            sockets: SocketSet::new(vec![]),
            connections: Vec::new(),
        }
    }

    /// Whether the frame that starts with `head` is for the service. The headers of Ethernet and of
    /// ARP or IPv4 suffice.
    pub fn wants(&self, head: &[u8]) -> bool {
        link::wants(head, self.address)
    }

    /// Receives a frame for which [`wants`](Stack::wants) is true.
    pub fn push(&mut self, frame: &[u8], now: Duration) {
        let stats = self.service.stats();
        stats.rx_count.add(1);
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            stats.rx_bad_eth.add(1);
            return;
        };
        stats.rx_accepted.add(1);
        // Without space for a reply, the frame is dropped. A network may drop frames.
        if !frame.src_addr().is_unicast() || !self.device.has_space() {
            stats.rx_accepted_err.add(1);
            return;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.reply_to_arp(&frame),
            EthernetProtocol::Ipv4 => self.process_packet(&frame, now),
            _ => stats.rx_accepted_unusual.add(1),
        }
    }

    /// Appends the next frame for the guest to `frame`, which is empty. False if there is none.
    pub fn pop(&mut self, frame: &mut Vec<u8>, now: Duration) -> bool {
        if self.device.frames.is_empty() {
            self.poll(now);
        }
        let Some(next) = self.device.frames.pop_front() else { return false };
        let stats = self.service.stats();
        stats.tx_frames.add(1);
        stats.tx_bytes.add(next.len() as u64);
        frame.extend_from_slice(&next);
        true
    }

    /// When to call [`pop`](Stack::pop) even without a new frame. `None` if no timer is pending, or
    /// if frames wait for the guest to receive them.
    pub fn deadline(&mut self, now: Duration) -> Option<Duration> {
        // Nothing continues before the guest receives the queued frames.
        if !self.device.frames.is_empty() {
            return None;
        }
        let tcp = self.interface.poll_at(instant(now), &self.sockets);
        let tcp = tcp.map(|at| Duration::from_micros(at.total_micros().max(0).cast_unsigned()));
        let stalled = self.connections.iter().map(Connection::deadline).min();
        [tcp, stalled].into_iter().flatten().min()
    }

    /// Drops all connections and queued frames.
    pub fn reset(&mut self) {
        self.service.stats().connections_destroyed.add(self.connections.len() as u64);
        self.connections.clear();
        self.sockets = SocketSet::new(vec![]);
        self.device.frames.clear();
    }

    /// Asserts that everything is within its bounds.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn check_bounds(&self) {
        assert!(self.connections.len() <= MAX_CONNECTIONS);
        assert_eq!(self.sockets.iter().count(), self.connections.len());
        assert!(self.device.frames.len() <= device::MAX_FRAMES);
        let most = http::MAX_HEAD + 30_000;
        assert!(self.connections.iter().all(|connection| connection.held() <= most));
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn connection_count(&self) -> usize {
        self.connections.len()
    }

    fn reply_to_arp(&mut self, frame: &EthernetFrame<&[u8]>) {
        match link::arp_request(frame) {
            Some((asker, mac, target))
                if target == self.address && asker != self.address && mac.is_unicast() =>
            {
                self.device.frames.push_back(link::arp_reply(self.address, asker, mac));
            }
            _ => self.service.stats().rx_accepted_err.add(1),
        }
    }

    fn process_packet(&mut self, frame: &EthernetFrame<&[u8]>, now: Duration) {
        let Some(segment) = self.inspect(frame.payload()) else { return };
        let IpAddress::Ipv4(address) = segment.from.addr;
        self.device.neighbors.learn(address, frame.src_addr());
        self.remove_closed();
        let known = self.connections.iter().position(|c| self.peer(c.handle) == Some(segment.from));
        let opened = (segment.opens && self.free_slot(known, now)).then(|| self.sockets.add(listener(PORT)));
        self.device.packet = Some(frame.payload().to_vec());
        self.interface.poll_ingress_single(instant(now), &mut self.device, &mut self.sockets);
        self.device.packet = None;
        if let Some(handle) = opened {
            if self.socket(handle).is_listening() {
                self.sockets.remove(handle);
            } else {
                self.service.stats().connections_created.add(1);
                self.connections.push(Connection::new(handle, now));
            }
        }
        self.process_connections(now);
    }

    /// Parses a packet; none if it must be dropped, which is counted.
    fn inspect(&self, packet: &[u8]) -> Option<Segment> {
        let stats = self.service.stats();
        let Ok(ip) = Ipv4Packet::new_checked(packet) else {
            stats.rx_accepted_err.add(1);
            return None;
        };
        // No guest needs to fragment packets this small. Packets other than TCP to the service are
        // not wanted.
        let is_fragment = ip.more_frags() || ip.frag_offset() != 0;
        if is_fragment || ip.next_header() != IpProtocol::Tcp || ip.dst_addr() != self.address {
            stats.rx_accepted_unusual.add(1);
            return None;
        }
        let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else {
            stats.rx_accepted_err.add(1);
            return None;
        };
        if ip.src_addr() == self.address || tcp.src_port() == 0 {
            stats.rx_accepted_err.add(1);
            return None;
        }
        let is_ours = tcp.dst_port() == PORT;
        if !is_ours {
            // smoltcp responds with a reset.
            stats.rx_accepted_unusual.add(1);
        }
        let opens = is_ours && tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin();
        Some(Segment { from: IpEndpoint::new(ip.src_addr().into(), tcp.src_port()), opens })
    }

    /// Frees a slot for a new connection if necessary. Returns whether there is one. `known` is an
    /// old connection with the same addresses and ports.
    fn free_slot(&mut self, known: Option<usize>, now: Duration) -> bool {
        if let Some(at) = known {
            // Only a connection in TIME-WAIT can be replaced. Otherwise the segment is a duplicate,
            // which smoltcp handles.
            let is_over = self.socket(self.connections[at].handle).state() == State::TimeWait;
            if is_over {
                self.remove(at);
            }
            return is_over;
        }
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let is_over = |c: &Connection| self.socket(c.handle).state() == State::TimeWait;
        let oldest = (0..self.connections.len()).min_by_key(|at| {
            let connection = &self.connections[*at];
            (!is_over(connection), connection.last_progress())
        });
        let Some(at) = oldest else { return false };
        let victim = &self.connections[at];
        if !is_over(victim) && now.saturating_sub(victim.last_progress()) < EVICTION_AGE {
            return false;
        }
        let handle = victim.handle;
        self.sockets.get_mut::<Socket<'_>>(handle).abort();
        // Sends the reset if there is space.
        self.interface.poll_egress(instant(now), &mut self.device, &mut self.sockets);
        self.remove(at);
        true
    }

    /// Handles timers and sends until there is nothing to send or the frame queue is full.
    fn poll(&mut self, now: Duration) {
        for connection in &mut self.connections {
            connection.expire(&mut self.sockets, now);
        }
        while self.device.has_space() {
            self.process_connections(now);
            let polled = self.interface.poll_egress(instant(now), &mut self.device, &mut self.sockets);
            if polled == PollResult::None {
                break;
            }
        }
        self.remove_closed();
        if !self.device.frames.is_empty() {
            self.service.stats().tx_count.add(1);
        }
    }

    fn process_connections(&mut self, now: Duration) {
        for connection in &mut self.connections {
            connection.process(&mut self.sockets, &self.service, now);
        }
    }

    /// Removes closed connections.
    fn remove_closed(&mut self) {
        for at in (0..self.connections.len()).rev() {
            let socket = self.socket(self.connections[at].handle);
            // An aborted socket keeps its remote endpoint until its reset is sent. A socket whose
            // guest resets it before the handshake completes listens again.
            let is_closed = socket.state() == State::Closed && socket.remote_endpoint().is_none();
            if is_closed || socket.is_listening() {
                self.remove(at);
            }
        }
    }

    fn remove(&mut self, at: usize) {
        let connection = self.connections.remove(at);
        self.sockets.remove(connection.handle);
        self.service.stats().connections_destroyed.add(1);
    }

    fn socket(&self, handle: SocketHandle) -> &Socket<'static> {
        self.sockets.get(handle)
    }

    fn peer(&self, handle: SocketHandle) -> Option<IpEndpoint> {
        self.socket(handle).remote_endpoint()
    }
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("address", &self.address)
            .field("connections", &self.connections.len())
            .finish_non_exhaustive()
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}
