//! The PCI capabilities of a virtio function (4.1.4). They locate its registers in the BAR.

use super::config_space::ConfigSpace;
use super::{BAR_SIZE, layout};

/// The capability id of virtio's capabilities: vendor-specific.
const VENDOR_SPECIFIC: u8 = 0x09;
/// The capability id of MSI-X.
const MSI_X: u8 = 0x11;

/// Kinds of virtio capabilities (4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// The offsets of the capabilities that a guest writes to.
#[derive(Debug, Clone, Copy)]
pub(super) struct CapabilityOffsets {
    /// The MSI-X message control register (2 bytes).
    pub(super) msix_control: usize,
    /// The configuration access capability (4.1.4.9).
    pub(super) window: Window,
}

/// The configuration access capability (4.1.4.9), for software that cannot map the BAR.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    at: usize,
}

/// The access that the guest set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowAccess {
    pub(super) offset: u64,
    /// 1, 2 or 4.
    pub(super) len: usize,
}

impl Window {
    /// The offset of the 4 data bytes.
    pub(super) fn data_at(self) -> usize {
        self.at + 16
    }

    /// The access to the BAR that an access to the data stands for. `None` if the set-up is
    /// invalid.
    pub(super) fn access(self, space: &ConfigSpace) -> Option<WindowAccess> {
        let [bar] = space.bytes(self.at + 4);
        let offset = u64::from(u32::from_le_bytes(space.bytes(self.at + 8)));
        let len = u32::from_le_bytes(space.bytes(self.at + 12));
        let fits = offset + u64::from(len) <= BAR_SIZE && offset.is_multiple_of(len.max(1).into());
        (bar == 0 && matches!(len, 1 | 2 | 4) && fits).then_some(WindowAccess { offset, len: len as usize })
    }
}

/// Adds all capabilities of a virtio function whose MSI-X message control is `msix_control`.
pub(super) fn add(space: &mut ConfigSpace, msix_control: u16) -> CapabilityOffsets {
    for (kind, offset) in [(COMMON_CFG, layout::COMMON), (ISR_CFG, layout::ISR), (DEVICE_CFG, layout::DEVICE)]
    {
        space.add_capability(VENDOR_SPECIFIC, &virtio(kind, 16, offset, layout::PART), &[]);
    }
    let mut notify = virtio(NOTIFY_CFG, 20, layout::NOTIFY, layout::PART).to_vec();
    notify.extend(layout::NOTIFY_MULTIPLIER.to_le_bytes());
    space.add_capability(VENDOR_SPECIFIC, &notify, &[]);

    let mut window = virtio(PCI_CFG, 20, 0, 0).to_vec();
    window.extend([0; 4]);
    // The guest writes BAR, offset and length. The data bytes are not stored.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..14].fill(0xff);
    let at = space.add_capability(VENDOR_SPECIFIC, &window, &writable);

    let mut msix = msix_control.to_le_bytes().to_vec();
    // The lowest bits are the index of the BAR, which is 0.
    msix.extend(layout::MSIX_TABLE.to_le_bytes());
    msix.extend(layout::MSIX_PBA.to_le_bytes());
    let msix_at = space.add_capability(MSI_X, &msix, &[0, 0xc0]);
    CapabilityOffsets { msix_control: msix_at + 2, window: Window { at } }
}

/// A virtio capability after its first two bytes: length, kind, BAR, id, padding, offset, length.
fn virtio(kind: u8, cap_len: u8, offset: u32, len: u32) -> [u8; 14] {
    let mut body = [0; 14];
    (body[0], body[1]) = (cap_len, kind);
    body[6..10].copy_from_slice(&offset.to_le_bytes());
    body[10..14].copy_from_slice(&len.to_le_bytes());
    body
}
