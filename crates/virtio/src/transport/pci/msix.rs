//! MSI-X (PCI 6.1.4): the table of messages, masks and pending bits.
//!
//! vCPU threads change the table and the masks under the transport's lock. Workers raise vectors
//! without a lock. They share a [`VectorMask`] for each vector.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::vector_mask::VectorMask;
use crate::device::TransportStats;
use crate::transport::device_status::DeviceStatus;

/// The message of a vector: a write of `data` to `addr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MsiMessage {
    /// Address of the write.
    pub addr: u64,
    /// The value of the write.
    pub data: u32,
}

/// Sends message-signalled interrupts. The machine implements it.
pub trait MsiVectors: Send + Sync {
    /// Sets the message of `vector`. Called before the vector is triggered, and only if it changed.
    fn set(&self, vector: u16, message: MsiMessage) -> io::Result<()>;
    /// Sends the message of `vector`. Does not block.
    fn trigger(&self, vector: u16);
}

/// The saved state of the table and the control register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// MSI-X is enabled.
    pub enabled: bool,
    /// All vectors are masked.
    pub function_masked: bool,
    /// Message, mask and pending bit of each vector.
    pub vectors: Vec<VectorState>,
}

/// The saved state of one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    /// The message.
    pub message: MsiMessage,
    /// The guest masked the vector.
    pub masked: bool,
    /// An interrupt is pending.
    pub pending: bool,
}

/// Enable bit of the message control register.
const ENABLE: u16 = 1 << 15;
/// Function mask bit of the message control register.
const FUNCTION_MASK: u16 = 1 << 14;
/// Bytes of a table entry.
const ENTRY: usize = 16;

/// The guest's set-up of a vector.
#[derive(Debug, Clone, Copy)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    /// The message that was last given to the machine.
    sent: Option<MsiMessage>,
}

/// The workers' side, which raises vectors.
pub(super) struct VectorMasks {
    masks: Vec<VectorMask<AtomicBool>>,
    vectors: Box<dyn MsiVectors>,
}

impl VectorMasks {
    /// Raises `vector`: sends its message, or sets its pending bit if it is masked.
    pub(super) fn raise(&self, vector: u16) {
        if let Some(vector_mask) = self.masks.get(usize::from(vector))
            && vector_mask.raise()
        {
            self.vectors.trigger(vector);
        }
    }

    fn open(&self, vector: u16) {
        if self.masks[usize::from(vector)].unmask() {
            self.vectors.trigger(vector);
        }
    }

    fn close(&self, vector: u16) {
        self.masks[usize::from(vector)].mask();
    }

    fn is_pending(&self, vector: usize) -> bool {
        self.masks[vector].is_pending()
    }

    /// Clears the pending bits when the device is reset.
    pub(super) fn clear_pending(&self) {
        for vector_mask in &self.masks {
            vector_mask.set_pending(false);
        }
    }
}

/// The guest's side: the table and the control register.
pub(super) struct Msix {
    masks: Arc<VectorMasks>,
    device_status: Arc<DeviceStatus>,
    stats: Arc<TransportStats>,
    table: Vec<Vector>,
    enabled: bool,
    function_masked: bool,
}

impl Msix {
    /// Creates `count` vectors (at most 2048), all masked, MSI-X disabled.
    pub(super) fn new(
        count: usize,
        vectors: Box<dyn MsiVectors>,
        device_status: Arc<DeviceStatus>,
        stats: Arc<TransportStats>,
    ) -> Self {
        let masks = (0..count).map(|_| VectorMask::default()).collect();
        let blank = Vector { message: MsiMessage { addr: 0, data: 0 }, masked: true, sent: None };
        Msix {
            masks: Arc::new(VectorMasks { masks, vectors }),
            device_status,
            stats,
            table: vec![blank; count],
            enabled: false,
            function_masked: false,
        }
    }

    pub(super) fn masks(&self) -> Arc<VectorMasks> {
        Arc::clone(&self.masks)
    }

    /// The number of vectors.
    pub(super) fn count(&self) -> u16 {
        self.table.len() as u16
    }

    /// The message control register.
    pub(super) fn control(&self) -> u16 {
        let size = (self.table.len() as u16).saturating_sub(1);
        size | if self.enabled { ENABLE } else { 0 } | if self.function_masked { FUNCTION_MASK } else { 0 }
    }

    /// Handles a guest's write of the message control register.
    pub(super) fn set_control(&mut self, value: u16) {
        self.enabled = value & ENABLE != 0;
        self.function_masked = value & FUNCTION_MASK != 0;
        for vector in 0..self.count() {
            self.refresh(vector);
        }
    }

    /// Masks or unmasks a vector.
    fn refresh(&mut self, vector: u16) {
        let entry = &mut self.table[usize::from(vector)];
        if !self.enabled || self.function_masked || entry.masked {
            self.masks.close(vector);
            return;
        }
        if entry.sent != Some(entry.message) {
            // Nothing may be sent while the message changes.
            self.masks.close(vector);
            if let Err(error) = self.masks.vectors.set(vector, entry.message) {
                self.device_status
                    .complain(&format_args!("cannot route vector {vector} as {:x?}: {error}", entry.message));
                return;
            }
            entry.sent = Some(entry.message);
            self.stats.vector_updates.add(1);
        }
        self.masks.open(vector);
    }

    /// Reads the table at `offset`. Bytes beyond it read as 0.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).map_or(0, |at| self.table_byte(at));
        }
    }

    fn table_byte(&self, at: usize) -> u8 {
        let Some(entry) = self.table.get(at / ENTRY) else { return 0 };
        let (addr, data) = (entry.message.addr.to_le_bytes(), entry.message.data.to_le_bytes());
        match at % ENTRY {
            at @ 0..8 => addr[at],
            at @ 8..12 => data[at - 8],
            12 => entry.masked.into(),
            _ => 0,
        }
    }

    /// Writes the table at `offset`. Other than aligned writes of 4 or 8 bytes are ignored (PCI
    /// 6.1.4.2).
    pub(super) fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let word = word.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
            self.write_table_word(at, word);
        }
    }

    fn write_table_word(&mut self, offset: u64, word: u32) {
        let Ok(vector) = u16::try_from(offset / ENTRY as u64) else { return };
        let Some(entry) = self.table.get_mut(usize::from(vector)) else { return };
        match offset % ENTRY as u64 {
            0 => entry.message.addr = entry.message.addr & !0xffff_ffff | u64::from(word),
            4 => entry.message.addr = entry.message.addr & 0xffff_ffff | u64::from(word) << 32,
            8 => entry.message.data = word,
            _ => entry.masked = word & 1 != 0,
        }
        // The message of an unmasked vector changes at once. For the guest the result of an
        // interrupt meanwhile is undefined; here it is harmless.
        self.refresh(vector);
    }

    /// Reads the pending bits at `offset`.
    pub(super) fn read_pba(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = (0..8).filter(|bit| {
                first
                    .checked_add(*bit)
                    .is_some_and(|vector| vector < self.table.len() && self.masks.is_pending(vector))
            });
            *byte = bits.fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    pub(super) fn save(&self) -> MsixState {
        let vectors = self.table.iter().enumerate().map(|(index, vector)| VectorState {
            message: vector.message,
            masked: vector.masked,
            pending: self.masks.is_pending(index),
        });
        MsixState { enabled: self.enabled, function_masked: self.function_masked, vectors: vectors.collect() }
    }

    /// Restores the state. Returns false if the number of vectors differs.
    pub(super) fn restore(&mut self, state: &MsixState) -> bool {
        if state.vectors.len() != self.table.len() {
            return false;
        }
        for ((vector, vector_mask), state) in self.table.iter_mut().zip(&self.masks.masks).zip(&state.vectors)
        {
            (vector.message, vector.masked) = (state.message, state.masked);
            vector_mask.set_pending(state.pending);
        }
        (self.enabled, self.function_masked) = (state.enabled, state.function_masked);
        for vector in 0..self.count() {
            self.refresh(vector);
        }
        true
    }
}
