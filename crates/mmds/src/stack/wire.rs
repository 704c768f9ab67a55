//! Between `smoltcp`, which speaks packets, and the guest, which speaks frames.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetProtocol, Ipv4Packet};

use super::link::{self, ETHERNET_LEN, Peers};
use crate::service::Service;

/// Most frames that wait for a guest to make room; with as many waiting, nothing more is said or heard.
pub(crate) const MAX_FRAMES: usize = 64;

/// One packet in, some frames out.
#[derive(Debug)]
pub(crate) struct Wire {
    /// The packet that is being taken in.
    pub(crate) packet: Option<Vec<u8>>,
    pub(crate) frames: VecDeque<Vec<u8>>,
    pub(crate) peers: Peers,
    mtu: usize,
    service: Arc<Service>,
}

impl Wire {
    pub(crate) fn new(mtu: usize, service: Arc<Service>) -> Wire {
        Wire { packet: None, frames: VecDeque::new(), peers: Peers::default(), mtu, service }
    }

    /// Whether a frame more may wait.
    pub(crate) fn has_room(&self) -> bool {
        self.frames.len() < MAX_FRAMES
    }
}

impl phy::Device for Wire {
    type RxToken<'a> = Packet;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Packet, Room<'_>)> {
        let packet = self.packet.take()?;
        self.has_room().then_some((Packet(packet), Room(self)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Room<'_>> {
        self.has_room().then_some(Room(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::default();
        // The guest leaves it to its device, which leaves it out: the segment never was on a wire.
        checksum.tcp = Checksum::Tx;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = checksum;
        capabilities
    }
}

/// A packet from the guest.
pub(crate) struct Packet(Vec<u8>);

impl phy::RxToken for Packet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

/// Room for a frame to the guest.
pub(crate) struct Room<'a>(&'a mut Wire);

impl phy::TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = link::frame(link::SERVICE_MAC, EthernetProtocol::Ipv4, len);
        let result = write(&mut frame[ETHERNET_LEN..]);
        let stats = self.0.service.stats();
        match receiver(&frame).and_then(|address| self.0.peers.find(address)) {
            Some(mac) => {
                frame[..6].copy_from_slice(mac.as_bytes());
                self.0.frames.push_back(frame);
            }
            // It will speak again and be known again, and TCP sends again.
            None => stats.tx_errors.add(1),
        }
        result
    }
}

fn receiver(frame: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Packet::new_checked(&frame[ETHERNET_LEN..]).ok()?.dst_addr())
}
