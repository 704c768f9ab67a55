//! Entry points for fuzzing: each takes any bytes as the acts of a hostile guest and runs them over
//! the real code.
//!
//! The targets under `fuzz/` call them with what a coverage-guided fuzzer makes up; a test here
//! calls them with seeded random bytes. What must hold: no panic, no end that does not come, no
//! state that cannot be saved and made again, and a device that is whole again after a reset.

mod pci_bus;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::device::Device;
use crate::rate_limiter::{BucketConfig, RateLimiterConfig};
use crate::testing::{DriverQueue, Echo, EchoControl, Guest, Kind, TestWorker, reused_ram};

pub use pci_bus::pci_bus;

/// Address of the queues of a guest that sets up its device correctly.
pub const BASE: u64 = 0x1000;
/// Descriptors in each of its queues.
pub const SIZE: u16 = 16;
/// Address of its buffers.
pub const DATA: u64 = 0x8_0000;
const RAM_MIB: u32 = 1;
/// Acts in one run, so that a long input is not a slow one.
pub const MAX_ACTS: usize = 400;

/// Bytes as numbers. At the end there are zeros.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let len = self.0.len().min(N);
        let (taken, rest) = self.0.split_at(len);
        bytes[..len].copy_from_slice(taken);
        self.0 = rest;
        bytes
    }

    /// The next number.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    /// The next number.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    /// The next number.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    /// The next number.
    pub fn u64(&mut self) -> u64 {
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

/// A bucket that limits nothing.
pub const NO_LIMIT: BucketConfig = BucketConfig { size: 0, refill_time_ms: 0, one_time_burst: 0 };

/// Limits from the next bytes.
pub fn limits(input: &mut Input<'_>) -> RateLimiterConfig {
    let mut bucket = || {
        let (size, refill_time_ms) = (u64::from(input.u16()), u64::from(input.u8()));
        (size > 0).then_some(BucketConfig { size, refill_time_ms, one_time_burst: input.u8().into() })
    };
    RateLimiterConfig { bandwidth: bucket(), ops: bucket() }
}

/// A guest whose only device is `device`, in memory that other runs used before.
pub fn new_guest(kind: Kind, device: Box<dyn Device>) -> Guest {
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
pub fn common_act(act: u8, input: &mut Input<'_>, guest: &mut Guest, driver: &mut Option<DriverQueue>) {
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
pub fn still_whole(guest: &mut Guest) {
    guest.worker.run();
    let mut driver = guest.start(BASE, SIZE, true);
    driver.add(&[(DATA, 4)], &[(DATA + 0x100, 4)]).expect("the queue is empty");
    driver.publish();
    guest.kick(0);
    assert!(driver.take_used().is_some(), "the device is dead after a reset");
}

/// Runs a target with random bytes that are the same each time.
pub fn seeded(target: fn(&[u8]), runs: u64) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
