//! Entry point of the fuzz target: a hostile guest and a hostile network on the network device.

use crate::{Net, NetConfig, NetState};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use virtio::fuzz::{BASE, DATA, Input, MAX_ACTS, NO_LIMIT, common_act, limits, new_guest};
use virtio::rate_limiter::RateLimiterUpdate;
use virtio::testing::{DriverQueue, Guest, Kind, TestWorker};
use vm_memory::{Bytes, GuestAddress};

use crate::backend::stream::Stream;
use crate::backend::tap::Tap;
use crate::interceptor::{FrameInterceptor, HEAD_LEN};
use crate::{NetBackend, NetSetup};
use virtio::worker::Nanos;

/// Receives and drops what the guest has sent.
pub(crate) fn drain(peer: &OwnedFd) {
    let mut bytes = [0; 4096];
    while rustix::net::recv(peer, &mut bytes, rustix::net::RecvFlags::empty()).is_ok_and(|(len, _)| len > 0) {
    }
}

/// A backend made of sockets, and the network end of each queue pair.
pub(crate) fn network(stream: bool, pairs: u16, with_service: bool) -> (NetSetup, Vec<OwnedFd>) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let kind = if stream { SocketType::STREAM } else { SocketType::SEQPACKET };
    let pair = |_| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, kind, flags, None).expect("sockets can be created")
    };
    let (mut ours, theirs): (Vec<_>, Vec<_>) = (0..pairs).map(pair).unzip();
    let backend = if stream {
        NetBackend::stream(Stream::new("fuzzed".into(), ours.swap_remove(0)))
    } else {
        NetBackend::tap(Tap::fake(ours))
    };
    let interceptor = with_service.then(|| Box::<Service>::default() as Box<dyn FrameInterceptor>);
    (NetSetup { backend, interceptor }, theirs)
}

/// Takes frames whose destination begins with an odd byte, and sends each back twice: at once, and
/// 1 ms later.
#[derive(Default)]
struct Service {
    replies: VecDeque<(Nanos, Vec<u8>)>,
}

impl FrameInterceptor for Service {
    fn wants(&self, head: &[u8]) -> bool {
        assert!(head.len() <= HEAD_LEN);
        head.first().is_some_and(|byte| byte & 1 != 0)
    }

    fn push(&mut self, frame: &[u8], now: Nanos) {
        if self.replies.len() < 16 {
            self.replies.push_back((0, frame.to_vec()));
            self.replies.push_back((now.saturating_add(1_000_000), frame.to_vec()));
        }
    }

    fn pop(&mut self, frame: &mut Vec<u8>, now: Nanos) -> bool {
        assert!(frame.is_empty());
        let Some((_, reply)) = self.replies.pop_front_if(|(at, _)| *at <= now) else { return false };
        frame.extend(reply);
        true
    }

    fn deadline(&mut self, _now: Nanos) -> Option<Nanos> {
        self.replies.front().map(|(at, _)| *at)
    }

    fn reset(&mut self) {
        self.replies.clear();
    }
}

/// A hostile guest and a hostile network on a network device.
///
/// The first byte chooses the transport, the check of the source MAC, the features that the driver
/// accepts, and the backend: a fake tap with one or two queues, or a stream; with an interceptor or
/// without. The network is made of sockets, so nothing of the host is used.
pub fn device(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let kind = if how & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let mac = (how & 2 != 0).then_some([2, 0, 0, 0, 0, 1]);
    let stream = how & 8 != 0;
    let pairs = if how & 16 != 0 && !stream { 2 } else { 1 };
    let config = NetConfig { id: "fuzzed".into(), mac, mtu: Some(1500), pairs, queue_size: 64 };
    let (setup, mut peers) = network(stream, pairs, how & 32 != 0);
    let (device, mut control) = Net::new(config, setup, limits(&mut input), limits(&mut input), 1)
        .expect("the configuration is valid");
    let mut guest = new_guest(kind, Box::new(device));
    let mut drivers = net_driver(&mut guest, pairs, how & 4 != 0);
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 20 {
            0 => guest.worker.advance(u64::from(input.u32())),
            1 => {
                let (rx, tx) = (limits(&mut input), limits(&mut input));
                control.update_limits(rx, tx, guest.worker.now());
            }
            2 => {
                let mut state = guest.save();
                let own: NetState = state.common().device.decode().expect("the state is this device's");
                let worker = TestWorker::new();
                let (setup, other_peers) = network(stream, pairs, how & 32 != 0);
                let device;
                (device, control) =
                    Net::restore(&own, None, setup, worker.now()).expect("a saved state can be restored");
                let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), worker);
                copy.restore(&state).expect("a saved state can be restored");
                (guest, peers) = (copy, other_peers);
            }
            3 => drivers = net_driver(&mut guest, pairs, input.u8() & 1 != 0),
            4..7 => {
                // The network sends bytes, which are a frame in most cases.
                let peer = &peers[usize::from(input.u8()) % peers.len()];
                let mut bytes = vec![input.u8(); usize::from(input.u16())];
                if stream && input.u8() < 250 {
                    let len = bytes.len() as u32;
                    bytes.splice(0..0, len.to_be_bytes());
                }
                let flags = rustix::net::SendFlags::NOSIGNAL;
                let _ = rustix::net::send(peer, &bytes, flags);
            }
            7 => peers.iter().for_each(drain),
            8 | 9 | 16..20 => net_request(&mut input, &mut guest, &mut drivers, pairs),
            act => {
                let mut one = drivers.pop();
                common_act(act, &mut input, &mut guest, &mut one);
                drivers.extend(one);
                if drivers.len() < 2 * usize::from(pairs) + 1 {
                    drivers = net_driver(&mut guest, pairs, true);
                }
            }
        }
        guest.worker.run();
    }
    control.update_limits(
        RateLimiterUpdate { bandwidth: Some(NO_LIMIT), ops: Some(NO_LIMIT) },
        RateLimiterUpdate { bandwidth: Some(NO_LIMIT), ops: Some(NO_LIMIT) },
        guest.worker.now(),
    );
    // After a reset, frames pass again.
    let mut drivers = net_driver(&mut guest, pairs, true);
    peers.iter().for_each(drain);
    let frame = [&[0; 12 + 6][..], &mac.unwrap_or_default(), &[0; 48]].concat();
    guest.ram.memory().write_slice(&frame, GuestAddress(DATA)).expect("the address is in RAM");
    drivers[1].add(&[(DATA, frame.len() as u32)], &[]).expect("the queue is empty");
    drivers[1].publish();
    guest.kick(1);
    guest.worker.run();
    assert!(drivers[1].take_used().is_some(), "the device does not work after a reset");
}

/// Starts a correct driver on all queues.
fn net_driver(guest: &mut Guest, pairs: u16, all_features: bool) -> Vec<DriverQueue> {
    let mut features = guest.negotiate(all_features);
    if !all_features {
        // Also without mergeable buffers.
        guest.reset();
        guest.set_status(3);
        features &= !(1 << 15);
        guest.set_driver_features(features);
        guest.set_status(11);
    }
    let queue = |index: u16| {
        let driver = DriverQueue::new(&guest.ram, BASE + 0x800 * u64::from(index), 64, features);
        guest.select_queue(index);
        guest.set_up_queue(&driver.state());
        guest.map_vectors();
        driver
    };
    let drivers = (0..=2 * pairs).map(queue).collect();
    guest.set_status(virtio::testing::RUNNING);
    guest.worker.run();
    drivers
}

/// Adds a receive buffer, a frame, or a control command.
fn net_request(input: &mut Input<'_>, guest: &mut Guest, drivers: &mut Vec<DriverQueue>, pairs: u16) {
    let index = u16::from(input.u8()) % (2 * pairs + 1);
    let part = |input: &mut Input<'_>| (DATA + u64::from(input.u16()), u32::from(input.u16()) % 0x4000);
    let (first, second) = (part(input), part(input));
    let driver = &mut drivers[usize::from(index)];
    let added = match index {
        index if index == 2 * pairs => {
            let command = [input.u8() % 6, input.u8() % 2, input.u8() % 3, 0, 0, 0, 0, 0, 0, 0];
            guest.ram.memory().write_slice(&command, GuestAddress(DATA)).expect("the address is in RAM");
            driver.add(&[(DATA, u32::from(input.u8() % 12))], &[(DATA + 0x100, 1)])
        }
        index if index % 2 == 0 => driver.add(&[], &[first, second]),
        _ => driver.add(&[first, second], &[]),
    };
    if added.is_some() {
        driver.publish();
        guest.kick(index.into());
        guest.worker.run();
    } else {
        *drivers = net_driver(guest, pairs, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio::fuzz::seeded;

    #[test]
    fn random_guests_do_not_break_the_net_device() {
        seeded(device, 2_000);
    }
}
