//! One interface's network: frames of a guest in, frames for it out.
//!
//! Whoever owns the interface calls, from one thread at a time: [`wants`](Stack::wants) for each frame of the guest's,
//! [`push`](Stack::push) with those that it wants, then [`pop`](Stack::pop) until there is no more, and again when
//! [`deadline`](Stack::deadline) has come. Time is any that goes on evenly, the same for all stacks of a service.
//!
//! Ethernet and ARP are ours ([`link`]): a few lines, by which an answer goes back to where its question came from. IPv4 and TCP are
//! `smoltcp`'s. There is no socket that waits for connections: one is made for each first segment that arrives while there is room, so
//! an interface whose guest never asks costs next to nothing.

mod connection;
mod link;
mod wire;

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
use wire::Wire;

/// Most connections of one interface at a time.
pub const MAX_CONNECTIONS: usize = 30;

/// How long a connection is safe from being dropped for a new one when there are [`MAX_CONNECTIONS`].
pub const GRACE: Duration = Duration::from_secs(1);

/// The service's port.
const PORT: u16 = 80;

/// The smallest MTU that IPv4 allows a network to have.
const MIN_MTU: u16 = 68;
/// Larger packets bring nothing here.
const MAX_MTU: u16 = 1500;

/// One interface's way to the service.
pub struct Stack {
    service: Arc<Service>,
    address: Ipv4Addr,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
}

/// A guest's segment, as far as it matters before it is taken in.
struct Segment {
    from: IpEndpoint,
    /// Whether it asks for a new connection to the service's port.
    opens: bool,
}

impl Stack {
    /// The way to `service` through an interface of this `mtu`. `seed` is random; sequence numbers come of it.
    pub fn new(service: Arc<Service>, mtu: u16, seed: u64, now: Duration) -> Stack {
        let address = service.config().address();
        let mtu = mtu.clamp(MIN_MTU, MAX_MTU);
        let mut wire = Wire::new(mtu.into(), Arc::clone(&service));
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, instant(now));
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(address.into(), 32)).expect("there is room for one address");
        });
        Stack { service, address, wire, interface, sockets: SocketSet::new(vec![]), connections: Vec::new() }
    }

    /// Whether the frame that begins with `head` is for the service. The headers of Ethernet and of ARP or IPv4 are enough.
    pub fn wants(&self, head: &[u8]) -> bool {
        link::wants(head, self.address)
    }

    /// Takes a frame that it wants, sent at `now`.
    pub fn push(&mut self, frame: &[u8], now: Duration) {
        let stats = self.service.stats();
        stats.rx_count.add(1);
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            stats.rx_bad_eth.add(1);
            return;
        };
        stats.rx_accepted.add(1);
        // While nothing more can be said, nothing is heard: a network loses frames too.
        if !frame.src_addr().is_unicast() || !self.wire.has_room() {
            stats.rx_accepted_err.add(1);
            return;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.answer_arp(&frame),
            EthernetProtocol::Ipv4 => self.take_packet(&frame, now),
            _ => stats.rx_accepted_unusual.add(1),
        }
    }

    /// Writes the next frame for the guest to `frame`, which is empty, and says whether there was one.
    pub fn pop(&mut self, frame: &mut Vec<u8>, now: Duration) -> bool {
        if self.wire.frames.is_empty() {
            self.advance(now);
        }
        let Some(next) = self.wire.frames.pop_front() else { return false };
        let stats = self.service.stats();
        stats.tx_frames.add(1);
        stats.tx_bytes.add(next.len() as u64);
        frame.extend_from_slice(&next);
        true
    }

    /// When [`pop`](Stack::pop) is to be called even if nothing happens before.
    pub fn deadline(&mut self, now: Duration) -> Option<Duration> {
        // What waits for the guest holds everything else up.
        if !self.wire.frames.is_empty() {
            return None;
        }
        let tcp = self.interface.poll_at(instant(now), &self.sockets);
        let tcp = tcp.map(|at| Duration::from_micros(at.total_micros().max(0).cast_unsigned()));
        let stalled = self.connections.iter().map(Connection::deadline).min();
        [tcp, stalled].into_iter().flatten().min()
    }

    /// Forgets all connections and what was to be sent on them.
    pub fn reset(&mut self) {
        self.service.stats().connections_destroyed.add(self.connections.len() as u64);
        self.connections.clear();
        self.sockets = SocketSet::new(vec![]);
        self.wire.frames.clear();
    }

    /// Asserts that it holds no more than it may.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn check_bounds(&self) {
        assert!(self.connections.len() <= MAX_CONNECTIONS);
        assert_eq!(self.sockets.iter().count(), self.connections.len());
        assert!(self.wire.frames.len() <= wire::MAX_FRAMES);
        let most = http::MAX_HEAD + 30_000;
        assert!(self.connections.iter().all(|connection| connection.held() <= most));
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn connection_count(&self) -> usize {
        self.connections.len()
    }

    fn answer_arp(&mut self, frame: &EthernetFrame<&[u8]>) {
        match link::arp_request(frame) {
            Some((asker, mac, target))
                if target == self.address && asker != self.address && mac.is_unicast() =>
            {
                self.wire.frames.push_back(link::arp_reply(self.address, asker, mac));
            }
            _ => self.service.stats().rx_accepted_err.add(1),
        }
    }

    fn take_packet(&mut self, frame: &EthernetFrame<&[u8]>, now: Duration) {
        let Some(segment) = self.inspect(frame.payload()) else { return };
        let IpAddress::Ipv4(address) = segment.from.addr;
        self.wire.peers.learn(address, frame.src_addr());
        self.reap();
        let known = self.connections.iter().position(|c| self.peer(c.handle) == Some(segment.from));
        let opened = (segment.opens && self.make_room(known, now)).then(|| self.sockets.add(listener(PORT)));
        self.wire.packet = Some(frame.payload().to_vec());
        self.interface.poll_ingress_single(instant(now), &mut self.wire, &mut self.sockets);
        self.wire.packet = None;
        if let Some(handle) = opened {
            if self.socket(handle).is_listening() {
                self.sockets.remove(handle);
            } else {
                self.service.stats().connections_created.add(1);
                self.connections.push(Connection::new(handle, now));
            }
        }
        self.pump(now);
    }

    /// What the packet is; none if it is to be dropped, which is counted.
    fn inspect(&self, packet: &[u8]) -> Option<Segment> {
        let stats = self.service.stats();
        let Ok(ip) = Ipv4Packet::new_checked(packet) else {
            stats.rx_accepted_err.add(1);
            return None;
        };
        // No guest has a reason to cut such small packets. (What is not TCP nobody wanted.)
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
            // TCP answers that nobody is there.
            stats.rx_accepted_unusual.add(1);
        }
        let opens = is_ours && tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin();
        Some(Segment { from: IpEndpoint::new(ip.src_addr().into(), tcp.src_port()), opens })
    }

    /// Whether there can be a new connection, with the one at `known` gone that has the same ends.
    fn make_room(&mut self, known: Option<usize>, now: Duration) -> bool {
        if let Some(at) = known {
            // Only what is over may begin anew; otherwise it is the same segment once more, and TCP knows what to do.
            let over = self.socket(self.connections[at].handle).state() == State::TimeWait;
            if over {
                self.remove(at);
            }
            return over;
        }
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let over = |c: &Connection| self.socket(c.handle).state() == State::TimeWait;
        let stalest = (0..self.connections.len()).min_by_key(|at| {
            let connection = &self.connections[*at];
            (!over(connection), connection.moved())
        });
        let Some(at) = stalest else { return false };
        let victim = &self.connections[at];
        if !over(victim) && now.saturating_sub(victim.moved()) < GRACE {
            return false;
        }
        let handle = victim.handle;
        self.sockets.get_mut::<Socket<'_>>(handle).abort();
        // Its guest is told, if there is room.
        self.interface.poll_egress(instant(now), &mut self.wire, &mut self.sockets);
        self.remove(at);
        true
    }

    /// Does what time and the guest's room allow: at most until as many frames wait as may.
    fn advance(&mut self, now: Duration) {
        for connection in &mut self.connections {
            connection.expire(&mut self.sockets, now);
        }
        while self.wire.has_room() {
            self.pump(now);
            let polled = self.interface.poll_egress(instant(now), &mut self.wire, &mut self.sockets);
            if polled == PollResult::None {
                break;
            }
        }
        self.reap();
        if !self.wire.frames.is_empty() {
            self.service.stats().tx_count.add(1);
        }
    }

    fn pump(&mut self, now: Duration) {
        for connection in &mut self.connections {
            connection.pump(&mut self.sockets, &self.service, now);
        }
    }

    /// Drops the connections that are over.
    fn reap(&mut self) {
        for at in (0..self.connections.len()).rev() {
            let socket = self.socket(self.connections[at].handle);
            // One that was cut off is closed and has its end left until that has been said. One whose guest took its first segment back
            // listens again, as it did before that.
            let is_over = socket.state() == State::Closed && socket.remote_endpoint().is_none();
            if is_over || socket.is_listening() {
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
