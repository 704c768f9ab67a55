//! Ethernet and ARP: what is for the service, and to whom its answers go.
//!
//! An answer goes to the hardware address that its question came from. So there is nothing to resolve: no ARP request is ever
//! sent to a guest, and it may have any address in any network, or several.

use std::net::Ipv4Addr;

use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    IpProtocol, Ipv4Packet,
};

/// The service's hardware address, in every microVM.
pub(crate) const SERVICE_MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);

/// Bytes of an Ethernet header without a VLAN tag.
pub(crate) const ETHERNET_LEN: usize = EthernetFrame::<&[u8]>::header_len();

/// Whether the frame that begins with `head` is one that `service` is to answer: an ARP request for it, or a TCP segment to it.
pub(crate) fn wants(head: &[u8], service: Ipv4Addr) -> bool {
    let Ok(frame) = EthernetFrame::new_checked(head) else { return false };
    match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            // There may be no more than the first bytes, so nothing is checked yet but what is looked at.
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

/// Who asks, with which hardware address, and for whom.
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

/// The frame that says that `service` is here.
pub(crate) fn arp_reply(service: Ipv4Addr, asker: Ipv4Addr, asker_mac: EthernetAddress) -> Vec<u8> {
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: SERVICE_MAC,
        source_protocol_addr: service,
        target_hardware_addr: asker_mac,
        target_protocol_addr: asker,
    };
    let mut frame = frame(asker_mac, EthernetProtocol::Arp, reply.buffer_len());
    reply.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_LEN..]));
    frame
}

/// A frame from the service with room for `len` bytes.
pub(crate) fn frame(to: EthernetAddress, ethertype: EthernetProtocol, len: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_LEN + len];
    EthernetRepr { src_addr: SERVICE_MAC, dst_addr: to, ethertype }
        .emit(&mut EthernetFrame::new_unchecked(&mut frame));
    frame
}

/// Which hardware address last spoke for which address: a bounded number of them, the ones that spoke last.
#[derive(Debug, Default)]
pub(crate) struct Peers(Vec<(Ipv4Addr, EthernetAddress)>);

impl Peers {
    /// Enough for a guest with an address per connection.
    pub(crate) const MAX: usize = 64;

    pub(crate) fn learn(&mut self, address: Ipv4Addr, mac: EthernetAddress) {
        match self.0.iter().position(|(known, _)| *known == address) {
            // Nearly always.
            Some(0) => self.0[0].1 = mac,
            at => {
                at.map(|at| self.0.remove(at));
                self.0.truncate(Peers::MAX - 1);
                self.0.insert(0, (address, mac));
            }
        }
    }

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
    fn only_arp_requests_and_tcp_segments_for_the_service_are_wanted() {
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
    fn an_arp_reply_names_the_service_to_who_asked() {
        let question = arp(ArpOperation::Request, SERVICE);
        let question = EthernetFrame::new_checked(&question[..]).unwrap();
        let (asker, mac, target) = arp_request(&question).unwrap();
        let reply = arp_reply(target, asker, mac);
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
    fn the_peers_that_spoke_last_are_known() {
        let mut peers = Peers::default();
        let address = |n: usize| Ipv4Addr::from(n as u32);
        let mac = |n: usize| EthernetAddress([0, 0, 0, 0, 0, n as u8]);
        for n in 0..Peers::MAX {
            peers.learn(address(n), mac(n));
        }
        peers.learn(address(0), mac(100));
        peers.learn(address(1000), mac(101));
        assert_eq!(peers.find(address(0)), Some(mac(100)));
        assert_eq!(peers.find(address(1)), None, "it was silent longest");
        assert_eq!(
            (2..Peers::MAX).filter(|n| peers.find(address(*n)) == Some(mac(*n))).count(),
            Peers::MAX - 2
        );
        assert_eq!(peers.0.len(), Peers::MAX);
    }
}
