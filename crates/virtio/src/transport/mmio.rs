//! virtio-mmio, version 2 (4.2.2): a page of registers, one interrupt line.
//!
//! # Interrupts
//!
//! The line is edge-triggered and not shared: an edge does not tell which device raised it. So the
//! free interrupt lines bound the number of devices, [`MAX_DEVICES`].
//!
//! # Accesses
//!
//! Registers are 32 bits wide and aligned. Any other access to them reads as 0 and writes nothing.
//! The configuration space, from 0x100 on, takes accesses of any size at any offset.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::core::{AddrHalf, Area, CommonState, TransportCore};
use super::device_status::DeviceStatus;
use super::{Attachment, IoEventFds, NotifyMatch, Resetting, RestoreError};
use crate::device::{Interrupt, TransportStats};

/// The size of a device's register window in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;

/// The interrupt lines (GSIs) for devices: those of the IOAPIC above the legacy devices.
pub const IRQ_LINES: RangeInclusive<u32> = 5..=23;

/// The most devices on this transport: one for each interrupt line.
pub const MAX_DEVICES: usize = 19;

/// Offset of `QueueNotify`. The value written is the queue's index.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Offset of `Status`. Writing 0 resets the device.
const STATUS: u64 = 0x70;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = 0;
const CONFIG: u64 = 0x100;

/// Interrupt status: a queue has used buffers.
const USED_BUFFER: u32 = 1;
/// Interrupt status: the configuration changed.
const CONFIG_CHANGE: u32 = 2;

/// The device's interrupt line. It is moved into the transport, because it is not shared.
pub trait IrqLine: Send + Sync {
    /// Raises an edge. Does not block.
    fn trigger(&self);
}

/// The saved state of a transport and its device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MmioState {
    /// The state that both transports have, with the device's.
    pub common: CommonState,
    /// Interrupts that the driver has not acknowledged.
    pub interrupt_status: u32,
}

/// The interrupt side, which the workers use.
struct MmioInterrupt {
    device_status: Arc<DeviceStatus>,
    status: AtomicU32,
    line: Box<dyn IrqLine>,
    stats: Arc<TransportStats>,
}

impl MmioInterrupt {
    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.stats.interrupts.add(1);
        self.line.trigger();
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) {
        self.raise(USED_BUFFER);
    }

    fn config(&self) {
        self.raise(CONFIG_CHANGE);
    }

    fn needs_reset(&self, why: &dyn fmt::Display) {
        self.stats.device_errors.add(1);
        if self.device_status.needs_reset(why) {
            self.config();
        }
    }
}

/// A device on virtio-mmio.
pub struct MmioTransport {
    common: TransportCore,
    interrupt: Arc<MmioInterrupt>,
    io_events: Arc<dyn IoEventFds>,
    /// For each queue, whether its kicks have an ioeventfd.
    kicks_taken: Vec<bool>,
    addr: u64,
}

impl MmioTransport {
    /// Creates a transport whose registers are at guest-physical `addr`, with interrupt `line`.
    pub fn new(
        attachment: Attachment,
        addr: u64,
        line: Box<dyn IrqLine>,
        io_events: Arc<dyn IoEventFds>,
    ) -> io::Result<Self> {
        let device_status = DeviceStatus::new(attachment.name.clone(), Arc::clone(&attachment.failures));
        let interrupt = Arc::new(MmioInterrupt {
            device_status: Arc::clone(&device_status),
            status: AtomicU32::new(0),
            line,
            stats: Arc::default(),
        });
        let common =
            TransportCore::new(attachment, device_status, Arc::clone(&interrupt) as Arc<dyn Interrupt>)?;
        let mut kicks_taken = Vec::with_capacity(common.queue_count().into());
        for (index, kick) in (0..).zip(common.kicks()) {
            let taken = io_events.register(addr + QUEUE_NOTIFY, NotifyMatch::U32(index), kick);
            if let Err(error) = &taken {
                interrupt
                    .device_status
                    .complain(&format_args!("kicks at {addr:#x} leave the kernel: {error}"));
            }
            kicks_taken.push(taken.is_ok());
        }
        Ok(MmioTransport { common, interrupt, io_events, kicks_taken, addr })
    }

    /// How often the device needed a reset.
    pub fn broken_count(&self) -> u64 {
        self.common.broken_count()
    }

    /// The counters of the transport.
    pub fn stats(&self) -> Arc<TransportStats> {
        Arc::clone(&self.interrupt.stats)
    }

    /// The guest-physical address of the registers.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Returns the state. The workers are paused.
    pub fn save(&mut self) -> MmioState {
        // Paused workers have given back every removed task.
        self.finish_reset();
        let common = self.common.save();
        MmioState { common, interrupt_status: self.interrupt.status.load(Ordering::SeqCst) }
    }

    /// Restores this new transport from `state`. The interrupt controller must be restored already.
    /// An active device starts when the workers resume.
    pub fn restore(&mut self, state: &MmioState) -> Result<(), RestoreError> {
        self.interrupt.status.store(state.interrupt_status & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
        self.common.restore(&state.common, state.interrupt_status & CONFIG_CHANGE != 0)
    }

    /// Drains the device and removes its ioeventfds. Returns false if it did not drain within
    /// `timeout`: then nothing was removed, and the call may be repeated.
    pub fn unplug(&mut self, timeout: Duration) -> bool {
        self.common.drain(timeout);
        let done = self.finish_reset();
        if done {
            let addr = self.addr + QUEUE_NOTIFY;
            for ((index, kick), taken) in (0..).zip(self.common.kicks()).zip(&mut self.kicks_taken) {
                if std::mem::take(taken) {
                    self.io_events.unregister(addr, NotifyMatch::U32(index), kick);
                }
            }
        }
        done
    }

    /// Handles a guest's read of `data.len()` bytes at `offset`.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.common.read_config(offset, data);
            return;
        }
        data.fill(0);
        if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
            *register = self.read_register(offset).to_le_bytes();
        }
    }

    /// Handles a guest's write of `data` at `offset`.
    ///
    /// `Some` is a reset that has not completed. Drivers do not poll for its end: unlock the
    /// transport, [wait](Resetting::wait), and only then resume the vCPU.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Resetting> {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.common.write_config(offset, data);
            return None;
        }
        let value = u32::from_le_bytes(<[u8; 4]>::try_from(data).ok()?);
        if (offset, value) == (STATUS, 0) {
            self.common.set_status(0);
            self.finish_reset();
            return self.common.resetting();
        }
        self.write_register(offset, value);
        None
    }

    /// Completes a reset, if there is one and its tasks have drained. Returns whether none is left.
    fn finish_reset(&mut self) -> bool {
        if !self.common.is_resetting() {
            return true;
        }
        let done = self.common.finish_reset();
        if done {
            self.interrupt.status.store(0, Ordering::SeqCst);
        }
        done
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        self.finish_reset();
        let common = &mut self.common;
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => common.device().kind() as u32,
            0x00c => VENDOR,
            0x010 => common.device_features(),
            0x034 => common.selected().map_or(0, |(_, max_size)| max_size.into()),
            0x044 => common.selected().map_or(0, |(queue, _)| queue.ready.into()),
            0x060 => self.interrupt.status.load(Ordering::SeqCst),
            STATUS => common.status().into(),
            // No shared memory region exists: its length and address read as all ones (4.2.2).
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => common.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        if !self.finish_reset() {
            return;
        }
        let common = &mut self.common;
        match offset {
            0x014 => common.device_feature_select = value,
            0x020 => common.set_driver_features(value),
            0x024 => common.driver_feature_select = value,
            // No such queue exists.
            0x030 => common.queue_select = u16::try_from(value).unwrap_or(u16::MAX),
            0x038 => common.set_queue_size(u16::try_from(value).unwrap_or(0)),
            0x044 => common.set_queue_ready(value == 1),
            QUEUE_NOTIFY => common.kick(value),
            0x064 => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            // The status has 8 bits. A larger value is ignored and not taken for 0.
            STATUS => {
                if let Ok(value) = u8::try_from(value) {
                    common.set_status(value);
                }
            }
            0x080 => common.set_queue_addr(Area::Descriptors, AddrHalf::Low, value),
            0x084 => common.set_queue_addr(Area::Descriptors, AddrHalf::High, value),
            0x090 => common.set_queue_addr(Area::Driver, AddrHalf::Low, value),
            0x094 => common.set_queue_addr(Area::Driver, AddrHalf::High, value),
            0x0a0 => common.set_queue_addr(Area::Device, AddrHalf::Low, value),
            0x0a4 => common.set_queue_addr(Area::Device, AddrHalf::High, value),
            _ => {}
        }
    }
}
