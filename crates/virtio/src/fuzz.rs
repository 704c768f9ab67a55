//! Entry points for fuzzing: each takes any bytes as the acts of a hostile guest and runs them over the real code.
//!
//! The targets under `fuzz/` call them with what a coverage-guided fuzzer makes up; a test here calls them with seeded random bytes.
//! What must hold: no panic, no end that does not come, no state that cannot be saved and made again, and a device that
//! is whole again after a reset.

mod pci_bus;

use std::sync::Arc;
use std::time::Duration;

use config::{CacheType, IoEngine};
use vm_memory::{Bytes, GuestAddress};

use crate::block::fuzz::FuzzedDisk;
pub use crate::block::fuzz::overlay;
use crate::block::{Block, BlockConfig};
use crate::device::{Device, DeviceState};
use crate::entropy::Entropy;
use crate::net::{self, Net, NetConfig};
use crate::rate_limiter::{BucketConfig, RateLimiterConfig, RateLimiterUpdate};
use crate::testing::{DriverQueue, Echo, EchoControl, Guest, Kind, TestWorker, reused_ram};
use crate::vsock::{self, Vsock};
use crate::worker::WorkerId;

pub use pci_bus::pci_bus;

/// Where the queues of a guest are that begins by the book.
const BASE: u64 = 0x1000;
const SIZE: u16 = 16;
const DATA: u64 = 0x8_0000;
const RAM_MIB: u32 = 1;
/// Acts in one run, so that a long input is not a slow one.
const MAX_ACTS: usize = 400;

/// Bytes as numbers. At the end there are zeros.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let len = self.0.len().min(N);
        let (taken, rest) = self.0.split_at(len);
        bytes[..len].copy_from_slice(taken);
        self.0 = rest;
        bytes
    }

    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// An address: mostly one that means something.
    fn addr(&mut self) -> u64 {
        match self.u8() {
            0 => self.u64(),
            1 => (u64::from(RAM_MIB) << 20).wrapping_sub(self.u8().into()),
            2..60 => DATA + u64::from(self.u16()),
            _ => BASE + u64::from(self.u16() % 0x400),
        }
    }

    /// 0 to 8 bytes.
    fn access(&mut self) -> (usize, [u8; 8]) {
        let len = match self.u8() {
            0..150 => 4,
            150..190 => 2,
            190..220 => 1,
            220..240 => 8,
            other => usize::from(other) % 9,
        };
        (len, self.bytes())
    }
}

/// A hostile guest over virtio-mmio, on a device that echoes.
pub fn mmio(data: &[u8]) {
    transport(Kind::Mmio, data);
}

/// A hostile guest over virtio-pci, on a device that echoes.
pub fn pci(data: &[u8]) {
    transport(Kind::Pci, data);
}

fn transport(kind: Kind, data: &[u8]) {
    let mut input = Input(data);
    let sizes = [SIZE, 1024];
    let (device, mut control) = Echo::new(&sizes, 1);
    let mut guest = new_guest(kind, Box::new(device));
    let mut driver: Option<DriverQueue> = None;
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 16 {
            0 => control.hold(usize::from(input.u8() % 4)),
            1 => control.release(),
            2 => {
                // What is in flight would make a save wait.
                control.release();
                let copy;
                (copy, control) = restored(kind, &mut guest, &sizes);
                guest = copy;
            }
            3 => control.change_config(),
            4 => drop(guest.unplug()),
            5 => {
                // A driver that waits for a reset waits for what is in flight.
                control.release();
                driver = Some(guest.start(BASE, SIZE, input.u8() & 1 == 0));
            }
            act => common_act(act, &mut input, &mut guest, &mut driver),
        }
        guest.worker.run();
    }
    control.release();
    still_whole(&mut guest);
}

/// A hostile guest on the entropy device. The first byte chooses the transport.
pub fn entropy(data: &[u8]) {
    let mut input = Input(data);
    let kind = if input.u8() & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let (device, mut control) = Entropy::new(limits(&mut input), 1);
    let mut guest = new_guest(kind, Box::new(device));
    let mut driver = Some(guest.start(BASE, SIZE, true));
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 16 {
            0 => guest.worker.advance(u64::from(input.u32())),
            1 => control.update(limits(&mut input), guest.worker.now()),
            2 => {
                let mut state = guest.save();
                let DeviceState::Entropy(own) = state.common().device.clone() else {
                    unreachable!("it is an entropy device")
                };
                let worker = TestWorker::new();
                let device;
                (device, control) = Entropy::restore(&own, worker.now());
                let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), worker);
                copy.restore(&state).expect("what was saved can be restored");
                guest = copy;
            }
            act => common_act(act, &mut input, &mut guest, &mut driver),
        }
        guest.worker.run();
    }
    control.update(RateLimiterUpdate { bandwidth: Some(NO_LIMIT), ops: Some(NO_LIMIT) }, guest.worker.now());
    still_whole(&mut guest);
}

/// A hostile guest on a disk. The first byte chooses the transport and the kind of disk.
///
/// What a request does is over when the worker comes to rest: the disk works synchronously on it, or the worker waits for its `io_uring`. So a
/// run is always the same, but for the order in which requests end that a ring has at the same time.
pub fn block(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let kind = if how & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let disk = FuzzedDisk {
        read_only: how & 2 != 0,
        cache_type: if how & 4 != 0 { CacheType::Writeback } else { CacheType::Unsafe },
        // One to read must be there before.
        overlaid: how & 0xa == 8,
        large: how & 16 != 0,
        // A ring is slow to make, so only one run in four has them.
        engine: if how & 0xc0 == 0x40 { IoEngine::Async } else { IoEngine::Sync },
    };
    let num_queues = if how & 32 != 0 { 2 } else { 1 };
    let config = BlockConfig { id: "fuzzed".into(), num_queues, queue_size: SIZE, io_threads: 1 };
    let workers = vec![WorkerId(0)];
    let (device, mut control) = Block::new(config, disk.open(), limits(&mut input), workers.clone(), 1)
        .expect("a device can be made");
    let mut guest = new_guest(kind, Box::new(device));
    let mut driver = Some(guest.start(BASE, SIZE, true));
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 18 {
            0 => guest.worker.advance(u64::from(input.u32())),
            1 => control.update_limits(limits(&mut input), guest.worker.now()),
            2 => {
                let mut state = guest.save();
                let DeviceState::Block(own) = state.common().device.clone() else {
                    unreachable!("it is a block device")
                };
                let worker = TestWorker::new();
                let device;
                (device, control) = Block::restore(&own, disk.open(), workers.clone(), worker.now())
                    .expect("what was saved can be restored");
                let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), worker);
                copy.restore(&state).expect("what was saved can be restored");
                guest = copy;
            }
            3 => {
                let mut replaced = control.replace(disk.open()).expect("the same disk can be opened again");
                guest.worker.run();
                replaced.wait(Duration::ZERO).expect("nothing is in flight");
            }
            4 | 16 | 17 => good_request(&mut input, &mut guest, &mut driver),
            act => common_act(act, &mut input, &mut guest, &mut driver),
        }
        guest.worker.run();
    }
    control.update_limits(
        RateLimiterUpdate { bandwidth: Some(NO_LIMIT), ops: Some(NO_LIMIT) },
        guest.worker.now(),
    );
    still_whole(&mut guest);
}

/// A hostile guest on a socket device, and a host that does as it likes. The first byte chooses the transport.
pub fn vsock(data: &[u8]) {
    const CID: u32 = 3;
    let mut input = Input(data);
    let kind = if input.u8() & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let (mut host, sockets) = vsock::fuzz::Host::new();
    let (device, mut control) = Vsock::new(CID, sockets);
    let mut guest = new_guest(kind, Box::new(device));
    let start = |guest: &mut Guest, event_idx| vsock::fuzz::Driver::start(guest, BASE, SIZE, DATA, event_idx);
    let mut driver = start(&mut guest, true);
    driver.give_buffers(&mut guest, 0x1000);
    // What a driver does that knows of one queue only.
    let mut other = None;
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 32 {
            0 => guest.worker.advance(u64::from(input.u32()) << 4),
            1 => control.reset_connections(),
            2 => {
                let mut state = guest.save();
                let DeviceState::Vsock(own) = state.common().device.clone() else {
                    unreachable!("it is a socket device")
                };
                // The old one ends first: a host has one device.
                let ram = guest.ram.clone();
                drop((guest, host));
                let (new_host, sockets) = vsock::fuzz::Host::new();
                let device;
                (device, control) = Vsock::restore(&own, None, sockets);
                let mut copy = Guest::with(kind, Box::new(device), ram, TestWorker::new());
                copy.restore(&state).expect("what was saved can be restored");
                (guest, host) = (copy, new_host);
            }
            3 => {
                drop(guest.worker.pause());
                host.act(input.u8(), input.u8(), input.u16());
                guest.worker.resume();
            }
            4 => driver = start(&mut guest, input.u8() & 1 == 0),
            16..20 => driver.give_buffers(&mut guest, u32::from(input.u16()) % 0x2000 + 1),
            20..26 => {
                let len = u32::from(input.u16());
                let (op, kind, ports, flags) = (input.u8(), input.u8(), input.u8(), input.u8());
                let told = if input.u8() < 240 { len } else { input.u32() };
                let header = vsock::fuzz::header(
                    CID.into(),
                    op,
                    kind,
                    ports,
                    flags,
                    [told, input.u32(), input.u8().into()],
                );
                driver.send(&mut guest, &header, len);
            }
            26..32 => host.act(input.u8(), input.u8(), input.u16()),
            act => {
                // Broken rings are the common acts' business; a driver by the book starts anew after them.
                common_act(act.max(5), &mut input, &mut guest, &mut other);
                if input.u8().is_multiple_of(4) {
                    driver = start(&mut guest, true);
                }
            }
        }
        guest.worker.run();
    }
    // Whatever happened: after a reset a client reaches the guest.
    let mut driver = start(&mut guest, true);
    let _client = host.dial(5);
    driver.give_buffers(&mut guest, 0x1000);
    guest.worker.advance(10_000_000_000);
    assert!(driver.queues[0].take_used().is_some(), "the device is dead after a reset");
}

/// A hostile guest on a network card, and a hostile network. The first byte chooses the transport, the address check, what the driver accepts,
/// and the network: something like a tap with one queue or two, or a stream; with a service in its place or without.
///
/// The network is made of sockets: nothing of the host is touched.
pub fn net(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let kind = if how & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let mac = (how & 2 != 0).then_some([2, 0, 0, 0, 0, 1]);
    let stream = how & 8 != 0;
    let pairs = if how & 16 != 0 && !stream { 2 } else { 1 };
    let config = NetConfig { id: "fuzzed".into(), mac, mtu: Some(1500), pairs, queue_size: 64 };
    let (setup, mut wires) = net::fuzz::setup(stream, pairs, how & 32 != 0);
    let (device, mut control) =
        Net::new(config, setup, limits(&mut input), limits(&mut input), 1).expect("a device can be made");
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
                let DeviceState::Net(own) = state.common().device.clone() else {
                    unreachable!("it is a network card")
                };
                let worker = TestWorker::new();
                let (setup, other_wires) = net::fuzz::setup(stream, pairs, how & 32 != 0);
                let device;
                (device, control) =
                    Net::restore(&own, None, setup, worker.now()).expect("what was saved can be restored");
                let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), worker);
                copy.restore(&state).expect("what was saved can be restored");
                (guest, wires) = (copy, other_wires);
            }
            3 => drivers = net_driver(&mut guest, pairs, input.u8() & 1 != 0),
            4..7 => {
                // The network has something, a frame mostly, and takes some.
                let wire = &wires[usize::from(input.u8()) % wires.len()];
                let mut bytes = vec![input.u8(); usize::from(input.u16())];
                if stream && input.u8() < 250 {
                    let len = bytes.len() as u32;
                    bytes.splice(0..0, len.to_be_bytes());
                }
                let flags = rustix::net::SendFlags::NOSIGNAL;
                let _ = rustix::net::send(wire, &bytes, flags);
            }
            7 => wires.iter().for_each(net::fuzz::drain),
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
    // After a reset frames go through again.
    let mut drivers = net_driver(&mut guest, pairs, true);
    wires.iter().for_each(net::fuzz::drain);
    let frame = [&[0; 12 + 6][..], &mac.unwrap_or_default(), &[0; 48]].concat();
    guest.ram.memory().write_slice(&frame, GuestAddress(DATA)).expect("it is in RAM");
    drivers[1].add(&[(DATA, frame.len() as u32)], &[]).expect("the queue is empty");
    drivers[1].publish();
    guest.kick(1);
    guest.worker.run();
    assert!(drivers[1].take_used().is_some(), "the device is dead after a reset");
}

/// A driver by the book on all queues.
fn net_driver(guest: &mut Guest, pairs: u16, all_features: bool) -> Vec<DriverQueue> {
    let mut features = guest.negotiate(all_features);
    if !all_features {
        // Without mergeable buffers, too.
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
    guest.set_status(crate::testing::RUNNING);
    guest.worker.run();
    drivers
}

/// A buffer for a frame, a frame, or a command.
fn net_request(input: &mut Input<'_>, guest: &mut Guest, drivers: &mut Vec<DriverQueue>, pairs: u16) {
    let index = u16::from(input.u8()) % (2 * pairs + 1);
    let part = |input: &mut Input<'_>| (DATA + u64::from(input.u16()), u32::from(input.u16()) % 0x4000);
    let (first, second) = (part(input), part(input));
    let driver = &mut drivers[usize::from(index)];
    let added = match index {
        index if index == 2 * pairs => {
            let command = [input.u8() % 6, input.u8() % 2, input.u8() % 3, 0, 0, 0, 0, 0, 0, 0];
            guest.ram.memory().write_slice(&command, GuestAddress(DATA)).expect("it is in RAM");
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

/// A request that a disk understands, mostly: a header, some data, a status.
fn good_request(input: &mut Input<'_>, guest: &mut Guest, driver: &mut Option<DriverQueue>) {
    let Some(driver) = driver else { return };
    let kind = [0u32, 1, 4, 8, 11, 13, 0, 1, 11, 13, 2, 0xffff][usize::from(input.u8() % 12)];
    let sector = if input.u8() < 240 { u64::from(input.u8()) } else { input.u64() };
    let len = if input.u8() < 200 { u32::from(input.u8() % 9) * 512 } else { u32::from(input.u16()) };
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let range = [
        &sector.to_le_bytes()[..],
        &u32::from(input.u8()).to_le_bytes(),
        &u32::from(input.u8() % 3).to_le_bytes(),
    ]
    .concat();
    let memory = guest.ram.memory();
    memory.write_slice(&[header, range].concat(), GuestAddress(DATA)).expect("it is in RAM");
    let data = (DATA + 0x1000 + u64::from(input.u8()) * 16, len);
    let head = (DATA, 16);
    let status = (DATA + 0x800, 1);
    let added = match kind {
        0 | 8 => driver.add(&[head], &[data, status]),
        1 => driver.add(&[head, data], &[status]),
        _ => driver.add(&[(DATA, 16 + 16 * u32::from(input.u8() % 3))], &[status]),
    };
    if added.is_some() {
        driver.publish();
        guest.kick(0);
        guest.worker.run();
    }
    // A driver by the book takes what is there; one that lies about its rings is another act's business.
    if driver.out() > usize::from(SIZE) / 2 {
        *driver = guest.start(BASE, SIZE, true);
    }
}

const NO_LIMIT: BucketConfig = BucketConfig { size: 0, refill_time_ms: 0, one_time_burst: 0 };

fn limits(input: &mut Input<'_>) -> RateLimiterConfig {
    let mut bucket = || {
        let (size, refill_time_ms) = (u64::from(input.u16()), u64::from(input.u8()));
        (size > 0).then_some(BucketConfig { size, refill_time_ms, one_time_burst: input.u8().into() })
    };
    RateLimiterConfig { bandwidth: bucket(), ops: bucket() }
}

fn new_guest(kind: Kind, device: Box<dyn Device>) -> Guest {
    Guest::with(kind, device, reused_ram(RAM_MIB), TestWorker::new())
}

fn restored(kind: Kind, guest: &mut Guest, sizes: &[u16]) -> (Guest, Arc<EchoControl>) {
    let state = guest.save();
    let (device, control) = Echo::new(sizes, 1);
    let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), TestWorker::new());
    copy.restore(&state).expect("what was saved can be restored");
    (copy, control)
}

/// What a guest can do to any device.
fn common_act(act: u8, input: &mut Input<'_>, guest: &mut Guest, driver: &mut Option<DriverQueue>) {
    match act {
        5 => *driver = Some(guest.start(BASE, SIZE, input.u8() & 1 == 0)),
        6 | 7 => {
            // Anywhere in guest memory: rings, tables and buffers.
            let (len, data) = input.access();
            let addr = GuestAddress(input.addr());
            // A guest's write outside its memory goes nowhere.
            let _ = guest.ram.memory().write_slice(&data[..len], addr);
        }
        8 | 9 => {
            if let Some(driver) = driver {
                let index = input.u16() % SIZE;
                let (addr, len) = (input.addr(), u32::from(input.u16()));
                let (flags, next) = (u16::from(input.u8() & 7), u16::from(input.u8() % 20));
                driver.set_descriptor(index, addr, len, flags, next);
                driver.set_avail_entry(index, input.u16() % (SIZE + 1));
            }
        }
        10 => {
            if let Some(driver) = driver {
                let ahead = u16::from(input.u8() % 20);
                driver.set_avail_idx(driver.used_idx().wrapping_add(ahead));
            }
            guest.kick(0);
        }
        11 => guest.kick_slowly(if input.u8() < 200 { 0 } else { input.u32() }),
        12 => {
            let (len, data) = input.access();
            guest.write_config(u64::from(input.u16() % 0x1000), &data[..len]);
        }
        _ => raw_access(input, guest),
    }
}

/// Any access to any register.
fn raw_access(input: &mut Input<'_>, guest: &mut Guest) {
    let (len, mut data) = input.access();
    let data = &mut data[..len];
    let (how, at) = (input.u8(), input.u16());
    match guest.kind() {
        Kind::Mmio => {
            let at = u64::from(if how & 4 == 0 { at & 0xfc } else { at & 0xfff });
            if how & 1 == 0 { drop(guest.mmio().write(at, data)) } else { guest.mmio().read(at, data) }
        }
        Kind::Pci => match how % 6 {
            0 => guest.pci().write_config(usize::from(at & 0x1ff), data),
            1 => guest.pci().read_config(usize::from(at & 0x1ff), data),
            2 | 3 => guest.pci().write_bar(pci_offset(at), data),
            _ => guest.pci().read_bar(pci_offset(at), data),
        },
    }
}

/// An offset in the BAR: the beginning of one of its parts, or anything.
fn pci_offset(at: u16) -> u64 {
    let within = u64::from(at & 0x3f);
    match at >> 13 {
        0 | 1 => within,
        2 => 0x2000 + within,
        3 => 0x4000 + within,
        4 => 0x6000 + within,
        5 => 0x8000 + within,
        6 => 0x48000 + within,
        _ => u64::from(at) << 3,
    }
}

/// Whatever happened: after a reset the device serves a driver by the book.
fn still_whole(guest: &mut Guest) {
    guest.worker.run();
    let mut driver = guest.start(BASE, SIZE, true);
    driver.add(&[(DATA, 4)], &[(DATA + 0x100, 4)]).expect("the queue is empty");
    driver.publish();
    guest.kick(0);
    assert!(driver.take_used().is_some(), "the device is dead after a reset");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a target with random bytes that are the same each time.
    fn seeded(target: fn(&[u8]), runs: u64) {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for run in 0..runs {
            let len = (next() % 1500) as usize;
            let bytes: Vec<u8> = (0..len).map(|_| (next() >> 24) as u8).collect();
            let result = std::panic::catch_unwind(|| target(&bytes));
            assert!(result.is_ok(), "run {run}, {len} bytes: {bytes:?}");
        }
    }

    #[test]
    fn random_guests_do_not_break_mmio() {
        seeded(mmio, 3_000);
    }

    #[test]
    fn random_guests_do_not_break_pci() {
        seeded(pci, 3_000);
    }

    #[test]
    fn random_guests_do_not_break_a_pci_bus() {
        seeded(pci_bus, 1_000);
    }

    #[test]
    fn random_guests_do_not_break_entropy() {
        seeded(entropy, 1_000);
    }

    #[test]
    fn random_guests_do_not_break_net() {
        seeded(net, 2_000);
    }

    #[test]
    fn random_guests_do_not_break_vsock() {
        seeded(vsock, 1_500);
    }

    #[test]
    fn random_guests_do_not_break_block() {
        seeded(block, 2_000);
    }

    #[test]
    fn overlays_with_random_changes_are_refused_or_are_disks() {
        seeded(overlay, 1_000);
    }
}
