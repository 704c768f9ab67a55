//! The buses of a machine: they find the device at a port or at a memory address.
//!
//! A bus is filled while a machine is built. Afterwards all vCPU threads read it; each device does
//! its own locking.
//!
//! As on hardware, a read that hits no device returns all ones, and a write that hits none is
//! ignored. An access that begins in a device's range goes to that device with its full length,
//! also if it ends behind the range.

use std::ops::Range;
use std::sync::Arc;

/// A device on a bus. Offsets count from the start of the device's range. `data` is little-endian
/// and not empty.
///
/// A device accepts any length. MMIO accesses have 1 to 8 bytes. On the port bus, KVM passes a
/// string instruction (`rep ins`, `rep outs`) as one access with all its bytes. Devices with
/// registers of one byte treat it as hardware does, as several accesses to the one port. Other
/// devices treat it as an access that is too wide.
pub trait BusDevice: Send + Sync {
    /// Reads registers; fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to registers.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The range of a new device overlaps that of another device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("bus range {wanted:#x?} overlaps {taken:#x?}")]
pub struct Overlap {
    /// The new device's range.
    pub wanted: Range<u64>,
    /// The range that is taken.
    pub taken: Range<u64>,
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start of their ranges, which do not overlap.
    devices: Vec<(Range<u64>, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Adds `device` at `range`, which must be free and not empty.
    pub fn add(&mut self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        debug_assert!(!range.is_empty());
        let at = self.devices.partition_point(|(r, _)| r.start < range.start);
        let neighbours = self.devices[at.saturating_sub(1)..].iter().take(2);
        if let Some((taken, _)) =
            neighbours.into_iter().find(|(r, _)| r.start < range.end && range.start < r.end)
        {
            return Err(Overlap { wanted: range, taken: taken.clone() });
        }
        self.devices.insert(at, (range, device));
        Ok(())
    }

    /// Reads from the device at `addr`, or all ones. Returns whether there is a device.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes to the device at `addr`. Returns whether there is a device.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, addr: u64) -> Option<(u64, &dyn BusDevice)> {
        let at = self.devices.partition_point(|(r, _)| r.start <= addr).checked_sub(1)?;
        let (range, device) = &self.devices[at];
        range.contains(&addr).then(|| (addr - range.start, device.as_ref()))
    }
}

/// The two buses of a machine.
#[derive(Debug, Default)]
pub(crate) struct Buses {
    /// Port I/O.
    pub(crate) ports: Bus,
    /// Memory-mapped I/O.
    pub(crate) mmio: Bus,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.devices.iter().map(|(r, _)| r)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn access_reaches_the_device_with_its_offset() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.add(0x3f8..0x400, device.clone()).unwrap();
        let mut byte = [0];
        assert!(bus.read(0x3fd, &mut byte));
        assert_eq!(byte, [5]);
        assert!(bus.write(0x3f8, b"x"));
        assert_eq!(*device.0.lock().unwrap(), [(0, b"x".to_vec())]);
    }

    #[test]
    fn access_without_a_device_reads_all_ones() {
        let mut bus = Bus::default();
        bus.add(0x10..0x20, Arc::new(Recorder::default())).unwrap();
        for addr in [0, 0xf, 0x20, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.add(0x10..0x20, Arc::new(Recorder::default())).unwrap();
        bus.add(0x40..0x50, Arc::new(Recorder::default())).unwrap();
        for range in [0x0..0x11, 0x1f..0x21, 0x12..0x13, 0x0..0x100, 0x3f..0x41, 0x4f..0x60] {
            assert!(bus.add(range.clone(), Arc::new(Recorder::default())).is_err(), "{range:x?}");
        }
        bus.add(0x20..0x40, Arc::new(Recorder::default())).unwrap();
    }
}
