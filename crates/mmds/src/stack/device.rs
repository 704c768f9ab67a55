//! The network device of `smoltcp`: converts its IP packets to the guest's Ethernet frames.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetProtocol, Ipv4Packet};

use super::link::{self, ETHERNET_LEN, Neighbors};
use crate::service::Service;

/// Most frames queued for the guest. With a full queue the stack neither sends nor receives.
pub(crate) const MAX_FRAMES: usize = 64;

/// A device with one received packet and a queue of frames to the guest.
#[derive(Debug)]
pub(crate) struct PacketDevice {
    /// The packet being received.
    pub(crate) packet: Option<Vec<u8>>,
    /// Frames queued for the guest.
    pub(crate) frames: VecDeque<Vec<u8>>,
    pub(crate) neighbors: Neighbors,
    mtu: usize,
    service: Arc<Service>,
}

impl PacketDevice {
    pub(crate) fn new(mtu: usize, service: Arc<Service>) -> PacketDevice {
        PacketDevice { packet: None, frames: VecDeque::new(), neighbors: Neighbors::default(), mtu, service }
    }

    /// Whether the queue has space for one more frame.
    pub(crate) fn has_space(&self) -> bool {
        self.frames.len() < MAX_FRAMES
    }
}

impl phy::Device for PacketDevice {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Rx, Tx<'_>)> {
        let packet = self.packet.take()?;
        self.has_space().then_some((Rx(packet), Tx(self)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Tx<'_>> {
        self.has_space().then_some(Tx(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::default();
        // The guest offloads TCP checksums to its network device, which does not compute them for
        // this service. So checksums of received segments are not verified.
        checksum.tcp = Checksum::Tx;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = checksum;
        capabilities
    }
}

/// A received packet.
pub(crate) struct Rx(Vec<u8>);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

/// Space for one frame to the guest.
pub(crate) struct Tx<'a>(&'a mut PacketDevice);

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = link::frame(link::SERVICE_MAC, EthernetProtocol::Ipv4, len);
        let result = write(&mut frame[ETHERNET_LEN..]);
        let stats = self.0.service.stats();
        match receiver(&frame).and_then(|address| self.0.neighbors.find(address)) {
            Some(mac) => {
                frame[..6].copy_from_slice(mac.as_bytes());
                self.0.frames.push_back(frame);
            }
            // TCP retransmits, and the next frame of the guest adds its neighbor entry again.
            None => stats.tx_errors.add(1),
        }
        result
    }
}

/// The receiver of a frame with an IPv4 packet.
fn receiver(frame: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Packet::new_checked(&frame[ETHERNET_LEN..]).ok()?.dst_addr())
}
