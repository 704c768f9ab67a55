//! A virtio device as a PCI function.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::capabilities::{self, CapabilityOffsets};
use super::config_space::{ConfigSpace, ConfigState, Identity};
use super::doorbells::{Doorbells, FunctionKey};
use super::msix::{MsiVectors, Msix, MsixState, VectorMasks};
use super::{BAR_SIZE, BarWindow, DEVICE_BASE, VENDOR, class_code, layout};
use crate::device::{Interrupt, TransportStats};
use crate::transport::core::{AddrHalf, Area, CommonState, TransportCore};
use crate::transport::device_status::DeviceStatus;
use crate::transport::{Attachment, RestoreError};

/// `VIRTIO_MSI_NO_VECTOR`: not mapped to a vector.
const NO_VECTOR: u16 = 0xffff;

/// ISR status: a queue has used buffers. Not set here: it belongs to pin interrupts.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// The address of a BAR that is not decoded.
pub(super) const NOT_DECODED: u64 = u64::MAX;

/// The saved state of a function and its device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PciState {
    /// The state that both transports have, with the device's.
    pub common: CommonState,
    /// ISR status.
    pub isr: u8,
    /// The vector of configuration changes.
    pub config_vector: u16,
    /// The vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// The configuration space.
    pub config: ConfigState,
    /// The MSI-X vectors.
    pub msix: MsixState,
}

/// The interrupt side, which the workers use.
struct PciInterrupt {
    device_status: Arc<DeviceStatus>,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    masks: Arc<VectorMasks>,
    stats: Arc<TransportStats>,
}

impl PciInterrupt {
    /// Raises `vector`, if there is one.
    fn raise(&self, vector: u16) {
        if vector != NO_VECTOR {
            self.stats.interrupts.add(1);
            self.masks.raise(vector);
        }
    }

    fn forget(&self) {
        self.isr.store(0, Ordering::SeqCst);
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.masks.clear_pending();
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        // The ISR bit is not needed with MSI-X (4.1.4.5.1), and there are no interrupts without it.
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.raise(vector.load(Ordering::Acquire));
        }
    }

    fn config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.raise(self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self, why: &dyn fmt::Display) {
        self.stats.device_errors.add(1);
        if self.device_status.needs_reset(why) {
            self.config();
        }
    }
}

/// A device on virtio-pci.
pub struct PciTransport {
    common: TransportCore,
    interrupt: Arc<PciInterrupt>,
    msix: Msix,
    space: ConfigSpace,
    offsets: CapabilityOffsets,
    window: BarWindow,
    /// The address of the decoded BAR, which the root reads without a lock.
    decoded: Arc<AtomicU64>,
    /// The doorbells of the bus, and this function's key in them.
    doorbells: Arc<Doorbells>,
    key: FunctionKey,
}

impl PciTransport {
    /// See [`PciRoot::new_function`](super::PciRoot::new_function).
    pub(super) fn new(
        attachment: Attachment,
        bar: u64,
        vectors: Box<dyn MsiVectors>,
        doorbells: Arc<Doorbells>,
        window: BarWindow,
    ) -> io::Result<Self> {
        let kind = attachment.device.kind();
        let queues = attachment.device.queue_sizes().len();
        let device_status = DeviceStatus::new(attachment.name.clone(), Arc::clone(&attachment.failures));
        let stats = Arc::<TransportStats>::default();
        let count = (queues + 1).min(layout::MAX_VECTORS);
        let msix = Msix::new(count, vectors, Arc::clone(&device_status), Arc::clone(&stats));
        let interrupt = Arc::new(PciInterrupt {
            device_status: Arc::clone(&device_status),
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            masks: msix.masks(),
            stats,
        });
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind as u16,
            revision: 1,
            class: class_code(kind),
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE + kind as u16,
        });
        space.add_bar(bar, BAR_SIZE);
        let offsets = capabilities::add(&mut space, msix.control());
        let common = TransportCore::new(
            attachment,
            Arc::clone(&device_status),
            Arc::clone(&interrupt) as Arc<dyn Interrupt>,
        )?;
        let key = doorbells.add(bar, common.kicks().cloned(), device_status);
        Ok(PciTransport {
            common,
            interrupt,
            msix,
            space,
            offsets,
            window,
            decoded: Arc::new(AtomicU64::new(NOT_DECODED)),
            doorbells,
            key,
        })
    }

    /// How often the device needed a reset.
    pub fn broken_count(&self) -> u64 {
        self.common.broken_count()
    }

    /// The counters of the transport.
    pub fn stats(&self) -> Arc<TransportStats> {
        Arc::clone(&self.interrupt.stats)
    }

    /// The address of the BAR; [`NOT_DECODED`] if it is not decoded.
    pub(super) fn decoded(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.decoded)
    }

    /// Returns the state. The workers are paused.
    pub fn save(&mut self) -> PciState {
        // Paused workers have given back every removed task.
        self.finish_reset();
        PciState {
            common: self.common.save(),
            isr: self.interrupt.isr.load(Ordering::SeqCst),
            config_vector: self.interrupt.config_vector.load(Ordering::SeqCst),
            queue_vectors: self.interrupt.queue_vectors.iter().map(|v| v.load(Ordering::SeqCst)).collect(),
            config: self.space.save(),
            msix: self.msix.save(),
        }
    }

    /// Restores this new function from `state`. The interrupt controller must be restored already.
    /// An active device starts when the workers resume.
    pub fn restore(&mut self, state: &PciState) -> Result<(), RestoreError> {
        let impossible =
            |what| RestoreError::Impossible { name: self.interrupt.device_status.name().into(), what };
        if state.queue_vectors.len() != self.interrupt.queue_vectors.len() {
            return Err(impossible("it has another number of vectors for queues"));
        }
        if !self.msix.restore(&state.msix) {
            return Err(impossible("it has another number of MSI-X vectors"));
        }
        self.interrupt.isr.store(state.isr & (ISR_QUEUE | ISR_CONFIG), Ordering::SeqCst);
        self.interrupt.config_vector.store(self.checked(state.config_vector), Ordering::SeqCst);
        for (vector, &saved) in self.interrupt.queue_vectors.iter().zip(&state.queue_vectors) {
            vector.store(self.checked(saved), Ordering::SeqCst);
        }
        self.space.restore(&state.config);
        self.move_bar();
        // A driver acknowledges by reading ISR. With MSI-X it does not, so it may get a spurious
        // interrupt.
        self.common.restore(&state.common, state.isr & ISR_CONFIG != 0)
    }

    /// Drains the device and removes its ioeventfds. Returns false if it did not drain within
    /// `timeout`: then nothing was removed, and the call may be repeated.
    pub fn unplug(&mut self, timeout: Duration) -> bool {
        self.common.drain(timeout);
        let done = self.finish_reset();
        if done {
            self.doorbells.remove(self.key);
            self.decoded.store(NOT_DECODED, Ordering::Release);
        }
        done
    }

    /// Handles a guest's read of the configuration space.
    pub fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let at = self.offsets.window.data_at();
        if overlaps(offset, data.len(), at, 4)
            && let Some(access) = self.offsets.window.access(&self.space)
        {
            let mut through = [0; 4];
            self.read_bar(access.offset, &mut through[..access.len]);
            self.space.put(at, &through);
        }
        self.space.read(offset, data);
    }

    /// Handles a guest's write of the configuration space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.space.write(offset, data);
        let at = self.offsets.window.data_at();
        if overlaps(offset, data.len(), at, 4)
            && let Some(access) = self.offsets.window.access(&self.space)
        {
            // Bytes that are not written keep their values.
            let mut through: [u8; 4] = self.space.bytes(at);
            for (i, byte) in data.iter().enumerate() {
                if let Some(through) = (offset + i).checked_sub(at).and_then(|i| through.get_mut(i)) {
                    *through = *byte;
                }
            }
            self.space.put(at, &through);
            self.write_bar(access.offset, &through[..access.len]);
        }
        if overlaps(offset, data.len(), self.offsets.msix_control, 2) {
            self.msix.set_control(u16::from_le_bytes(self.space.bytes(self.offsets.msix_control)));
        }
        if offset < 0x40 {
            self.move_bar();
        }
    }

    /// Handles a guest's read of `data.len()` bytes at `offset` in the BAR.
    pub fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(at) = u32::try_from(offset) else { return };
        self.finish_reset();
        match at {
            layout::COMMON..layout::ISR => {
                let image = self.common_image();
                crate::device::read_bytes(&image, offset, data);
            }
            layout::ISR => {
                if let Some(first) = data.first_mut() {
                    // Reading clears it.
                    *first = self.interrupt.isr.swap(0, Ordering::SeqCst);
                }
            }
            layout::DEVICE..layout::NOTIFY => {
                self.common.read_config(offset - u64::from(layout::DEVICE), data);
            }
            layout::MSIX_TABLE..layout::MSIX_PBA => {
                self.msix.read_table(offset - u64::from(layout::MSIX_TABLE), data);
            }
            layout::MSIX_PBA.. => self.msix.read_pba(offset - u64::from(layout::MSIX_PBA), data),
            _ => {}
        }
    }

    /// Handles a guest's write of `data` at `offset` in the BAR.
    pub fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let Ok(at) = u32::try_from(offset) else { return };
        match at {
            layout::COMMON..layout::ISR => self.write_common(at, data),
            layout::DEVICE..layout::NOTIFY => {
                self.common.write_config(offset - u64::from(layout::DEVICE), data);
            }
            layout::NOTIFY..layout::MSIX_TABLE => {
                let at = at - layout::NOTIFY;
                if at.is_multiple_of(layout::NOTIFY_MULTIPLIER) {
                    self.common.kick(at / layout::NOTIFY_MULTIPLIER);
                }
            }
            layout::MSIX_TABLE..layout::MSIX_PBA => {
                self.msix.write_table(offset - u64::from(layout::MSIX_TABLE), data);
            }
            _ => {}
        }
    }

    /// The bytes of the common configuration (4.1.4.3).
    fn common_image(&self) -> [u8; 0x40] {
        let common = &self.common;
        let selected = common.selected().map(|(queue, _)| *queue);
        let queue_vector = self.interrupt.queue_vectors.get(usize::from(common.queue_select));
        let mut image = [0; 0x40];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &common.device_feature_select.to_le_bytes());
        put(0x04, &common.device_features().to_le_bytes());
        put(0x08, &common.driver_feature_select.to_le_bytes());
        put(0x0c, &common.driver_features().to_le_bytes());
        put(0x10, &self.interrupt.config_vector.load(Ordering::SeqCst).to_le_bytes());
        put(0x12, &common.queue_count().to_le_bytes());
        put(0x14, &[common.status(), common.config_generation() as u8]);
        put(0x16, &common.queue_select.to_le_bytes());
        put(0x1a, &queue_vector.map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst)).to_le_bytes());
        if let Some(queue) = selected {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1c, &u16::from(queue.ready).to_le_bytes());
            put(0x1e, &common.queue_select.to_le_bytes());
            put(0x20, &queue.desc_table.to_le_bytes());
            put(0x28, &queue.avail_ring.to_le_bytes());
            put(0x30, &queue.used_ring.to_le_bytes());
        }
        image
    }

    /// Writes the common configuration. A field is written whole; a 64-bit field also by halves
    /// (4.1.3.1).
    fn write_common(&mut self, at: u32, data: &[u8]) {
        if data.len() == 8 && matches!(at, 0x20 | 0x28 | 0x30) {
            self.write_common(at, &data[..4]);
            self.write_common(at + 4, &data[4..]);
            return;
        }
        let value = match data.len() {
            1 | 2 | 4 => data.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)),
            _ => return,
        };
        if !self.finish_reset() && (at, data) != (0x14, &[0]) {
            return;
        }
        let common = &mut self.common;
        match (at, data.len()) {
            (0x00, 4) => common.device_feature_select = value,
            (0x08, 4) => common.driver_feature_select = value,
            (0x0c, 4) => common.set_driver_features(value),
            (0x10, 2) => {
                let vector = self.checked(value as u16);
                self.interrupt.config_vector.store(vector, Ordering::SeqCst);
            }
            (0x14, 1) => {
                common.set_status(value as u8);
                // Does not wait: the driver polls the status until it is 0.
                self.finish_reset();
            }
            (0x16, 2) => common.queue_select = value as u16,
            (0x18, 2) => common.set_queue_size(value as u16),
            (0x1a, 2) => {
                let vector = self.checked(value as u16);
                if let Some(slot) = self.interrupt.queue_vectors.get(usize::from(self.common.queue_select)) {
                    slot.store(vector, Ordering::SeqCst);
                }
            }
            // A queue can only be enabled (4.1.4.3.2).
            (0x1c, 2) if value == 1 => common.set_queue_ready(true),
            (0x20, 4) => common.set_queue_addr(Area::Descriptors, AddrHalf::Low, value),
            (0x24, 4) => common.set_queue_addr(Area::Descriptors, AddrHalf::High, value),
            (0x28, 4) => common.set_queue_addr(Area::Driver, AddrHalf::Low, value),
            (0x2c, 4) => common.set_queue_addr(Area::Driver, AddrHalf::High, value),
            (0x30, 4) => common.set_queue_addr(Area::Device, AddrHalf::Low, value),
            (0x34, 4) => common.set_queue_addr(Area::Device, AddrHalf::High, value),
            _ => {}
        }
    }

    /// `vector` if it exists, else [`NO_VECTOR`], by which the driver sees that it does not.
    fn checked(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }

    /// Completes a reset, if there is one and its tasks have drained. Returns whether none is left.
    fn finish_reset(&mut self) -> bool {
        if !self.common.is_resetting() {
            return true;
        }
        let done = self.common.finish_reset();
        if done {
            self.interrupt.forget();
        }
        done
    }

    /// Handles a possible change of the BAR or its decoding.
    fn move_bar(&mut self) {
        let fits = |bar: &u64| {
            *bar >= self.window.start && bar.checked_add(BAR_SIZE).is_some_and(|end| end <= self.window.end)
        };
        let bar = self.space.decoded_bar().filter(fits);
        self.decoded.store(bar.unwrap_or(NOT_DECODED), Ordering::Release);
        self.doorbells.moved(self.key, bar);
    }
}

fn overlaps(a: usize, a_len: usize, b: usize, b_len: usize) -> bool {
    a < b + b_len && b < a.saturating_add(a_len)
}
