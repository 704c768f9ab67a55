//! The configuration space of a PCI function (type 0 header), with one 64-bit memory BAR or none.
//!
//! It is an image of 256 bytes with a mask of the writable bits. The function handles registers
//! with side effects (MSI-X control, the configuration access capability) after the write.

use serde::{Deserialize, Serialize};

/// The size of the image. The rest of the 4096 bytes of ECAM reads as 0: there are no extended
/// capabilities.
pub(super) const SIZE: usize = 256;

/// Command register: memory space enable.
const COMMAND_MEMORY: u16 = 1 << 1;
/// The writable bits of the command register: memory space, bus master, interrupt disable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
/// Status register: capabilities list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// BAR 0: memory, 64-bit, not prefetchable.
const BAR_FLAGS: u64 = 0b100;

const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const INTERRUPT_LINE: usize = 0x3c;

/// The saved state of the writable bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// The image. Only its writable bits are restored.
    pub bytes: Vec<u8>,
}

/// The ids of a function.
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) revision: u8,
    /// 24 bits.
    pub(super) class: u32,
    pub(super) subsystem_vendor: u16,
    pub(super) subsystem: u16,
}

/// The image and its mask.
#[derive(Debug, Clone)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// The offset of the last "next" pointer, and that of the next capability.
    last_link: usize,
    end: usize,
}

impl ConfigSpace {
    pub(super) fn new(identity: &Identity) -> Self {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            last_link: CAPABILITIES_POINTER,
            end: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Registers without effect that software expects to read back.
        space.allow(0x0c, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds a 64-bit memory BAR 0 of `size`, a power of two, at `addr`.
    pub(super) fn add_bar(&mut self, addr: u64, size: u64) {
        self.put(BAR0, &(addr & !(size - 1) | BAR_FLAGS).to_le_bytes());
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Adds a capability: `id`, then `body`, whose bits in `writable` are writable. Returns its
    /// offset.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        self.bytes[self.last_link] = at as u8;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(0x06, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_link = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Sets bytes, also those that a guest cannot write.
    pub(super) fn put(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// The bytes at `at`.
    pub(super) fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.bytes[at + i])
    }

    /// Handles a guest's read of any offset and length.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        crate::device::read_bytes(&self.bytes, offset as u64, data);
    }

    /// Handles a guest's write of any offset and length. Only writable bits change.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((old, mask), byte) in bytes.zip(data) {
            *old = *old & !mask | byte & mask;
        }
    }

    /// The address of BAR 0, if it is decoded.
    pub(super) fn decoded_bar(&self) -> Option<u64> {
        let command = u16::from_le_bytes(self.bytes(COMMAND));
        (command & COMMAND_MEMORY != 0).then(|| u64::from_le_bytes(self.bytes(BAR0)) & !0xf)
    }

    pub(super) fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    pub(super) fn restore(&mut self, state: &ConfigState) {
        self.write(0, &state.bytes);
    }
}
