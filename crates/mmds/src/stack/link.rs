//! Ethernet and ARP: which frames are for the service, and where its responses go.
//!
//! A response goes to the MAC address from which the guest's last packet came. So the service never
//! sends ARP requests, and a guest may have any IP address in any network, or several.

use std::net::Ipv4Addr;

use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    IpProtocol, Ipv4Packet,
};

/// MAC address of the service, the same in every microVM.
pub(crate) const SERVICE_MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);

/// Length of an Ethernet header without VLAN tag, in bytes.
pub(crate) const ETHERNET_LEN: usize = EthernetFrame::<&[u8]>::header_len();

/// Whether a frame that starts with `head` is for `service`: an ARP request for its address, or a
/// TCP segment to it.
pub(crate) fn wants(head: &[u8], service: Ipv4Addr) -> bool {
    let Ok(frame) = EthernetFrame::new_checked(head) else { return false };
    match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            // `head` may be only the first bytes of the frame, so only the fields used are checked.
            let packet = Ipv4Packet::new_unchecked(frame.payload());
            frame.payload().len() >= 20
                && packet.version() == 4
                && packet.next_header() == IpProtocol::Tcp
                && packet.dst_addr() == service
        }
        EthernetProtocol::Arp => arp_request(&frame).is_some_and(|(_, _, target)| target == service),
        _ => false,
    }
}

/// Sender IP, sender MAC and target IP of an ARP request.
pub(crate) fn arp_request(frame: &EthernetFrame<&[u8]>) -> Option<(Ipv4Addr, EthernetAddress, Ipv4Addr)> {
    let packet = ArpPacket::new_checked(frame.payload()).ok()?;
    match ArpRepr::parse(&packet).ok()? {
        ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } => Some((source_protocol_addr, source_hardware_addr, target_protocol_addr)),
        _ => None,
    }
}

/// The frame of an ARP reply from `service`.
pub(crate) fn arp_reply(service: Ipv4Addr, sender: Ipv4Addr, sender_mac: EthernetAddress) -> Vec<u8> {
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: SERVICE_MAC,
        source_protocol_addr: service,
        target_hardware_addr: sender_mac,
        target_protocol_addr: sender,
    };
    let mut frame = frame(sender_mac, EthernetProtocol::Arp, reply.buffer_len());
    reply.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_LEN..]));
    frame
}

/// A frame from the service with `len` bytes of payload, all zero.
pub(crate) fn frame(to: EthernetAddress, ethertype: EthernetProtocol, len: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_LEN + len];
    EthernetRepr { src_addr: SERVICE_MAC, dst_addr: to, ethertype }
        .emit(&mut EthernetFrame::new_unchecked(&mut frame));
    frame
}

/// Neighbor table: MAC addresses by IP address, most recently seen first. Bounded; the entry seen
/// least recently is dropped.
#[derive(Debug, Default)]
pub(crate) struct Neighbors(Vec<(Ipv4Addr, EthernetAddress)>);

impl Neighbors {
    /// Most entries. Enough for a guest with one IP address per connection.
    pub(crate) const MAX: usize = 64;

    /// Adds or refreshes an entry.
    pub(crate) fn learn(&mut self, address: Ipv4Addr, mac: EthernetAddress) {
        match self.0.iter().position(|(known, _)| *known == address) {
            // The common case.
            Some(0) => self.0[0].1 = mac,
            at => {
                at.map(|at| self.0.remove(at));
                self.0.truncate(Neighbors::MAX - 1);
                self.0.insert(0, (address, mac));
            }
        }
    }

    /// The MAC address of an IP address.
    pub(crate) fn find(&self, address: Ipv4Addr) -> Option<EthernetAddress> {
        self.0.iter().find(|(known, _)| *known == address).map(|(_, mac)| *mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const GUEST_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    fn arp(operation: ArpOperation, target: Ipv4Addr) -> Vec<u8> {
        let repr = ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: GUEST_MAC,
            source_protocol_addr: GUEST,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut frame = frame(EthernetAddress::BROADCAST, EthernetProtocol::Arp, repr.buffer_len());
        repr.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_LEN..]));
        frame
    }

    fn ip(version: u8, protocol: u8, to: Ipv4Addr) -> Vec<u8> {
        let mut frame = frame(SERVICE_MAC, EthernetProtocol::Ipv4, 20);
        frame[14] = version << 4 | 5;
        frame[23] = protocol;
        frame[30..34].copy_from_slice(&to.octets());
        frame
    }

    #[test]
    fn only_arp_requests_and_tcp_for_the_service_are_wanted() {
        let other = Ipv4Addr::new(169, 254, 169, 253);
        for (frame, wanted) in [
            (arp(ArpOperation::Request, SERVICE), true),
            (arp(ArpOperation::Reply, SERVICE), false),
            (arp(ArpOperation::Request, other), false),
            (ip(4, 6, SERVICE), true),
            (ip(4, 6, other), false),
            (ip(4, 17, SERVICE), false),
            (ip(4, 1, SERVICE), false),
            (ip(6, 6, SERVICE), false),
        ] {
            assert_eq!(wants(&frame, SERVICE), wanted, "{frame:x?}");
            for len in 0..34 {
                assert!(!wants(&frame[..len], SERVICE));
            }
        }
    }

    #[test]
    fn arp_reply_goes_to_the_sender_of_the_request() {
        let question = arp(ArpOperation::Request, SERVICE);
        let question = EthernetFrame::new_checked(&question[..]).unwrap();
        let (sender, mac, target) = arp_request(&question).unwrap();
        let reply = arp_reply(target, sender, mac);
        let reply = EthernetFrame::new_checked(&reply[..]).unwrap();
        assert_eq!((reply.dst_addr(), reply.src_addr()), (GUEST_MAC, SERVICE_MAC));
        let packet = ArpPacket::new_checked(reply.payload()).unwrap();
        assert_eq!(
            ArpRepr::parse(&packet).unwrap(),
            ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: SERVICE_MAC,
                source_protocol_addr: SERVICE,
                target_hardware_addr: GUEST_MAC,
                target_protocol_addr: GUEST,
            }
        );
    }

    #[test]
    fn neighbors_seen_last_are_kept() {
        let mut neighbors = Neighbors::default();
        let address = |n: usize| Ipv4Addr::from(n as u32);
        let mac = |n: usize| EthernetAddress([0, 0, 0, 0, 0, n as u8]);
        for n in 0..Neighbors::MAX {
            neighbors.learn(address(n), mac(n));
        }
        neighbors.learn(address(0), mac(100));
        neighbors.learn(address(1000), mac(101));
        assert_eq!(neighbors.find(address(0)), Some(mac(100)));
        assert_eq!(neighbors.find(address(1)), None, "it was seen least recently");
        assert_eq!(
            (2..Neighbors::MAX).filter(|n| neighbors.find(address(*n)) == Some(mac(*n))).count(),
            Neighbors::MAX - 2
        );
        assert_eq!(neighbors.0.len(), Neighbors::MAX);
    }
}
