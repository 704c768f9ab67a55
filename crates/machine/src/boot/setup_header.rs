//! The setup header of a `bzImage` (Linux: Documentation/arch/x86/boot.rst).

use std::fs::File;

use super::error::BootError;
use super::io::read_at;

/// The setup header's offset, in the file and in the zero page.
pub(super) const HEADER_OFFSET: usize = 0x1f1;
/// The most bytes of the setup header: it ends where the zero page's next field begins.
pub(super) const HEADER_MAX: usize = 0x290 - HEADER_OFFSET;

/// The setup header of a `bzImage`. Offsets are those of the boot protocol's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SetupHeader {
    bytes: [u8; HEADER_MAX],
    /// How many of `bytes` belong to the header.
    len: usize,
}

impl SetupHeader {
    /// Reads the header of a file of `len` bytes. `None` if it has none: it is no `bzImage`.
    pub(super) fn read(file: &mut File, len: u64) -> Result<Option<Self>, BootError> {
        let mut header = SetupHeader { bytes: [0; HEADER_MAX], len: HEADER_MAX };
        if len < (HEADER_OFFSET + HEADER_MAX) as u64 {
            return Ok(None);
        }
        read_at(file, HEADER_OFFSET as u64, &mut header.bytes, "kernel image")?;
        if header.u16(0x1fe) != 0xaa55 || header.u32(0x202) != u32::from_le_bytes(*b"HdrS") {
            return Ok(None);
        }
        // The jump instruction before `HdrS` leads to the header's end.
        let end = 0x202 + usize::from(header.u8(0x201));
        header.len = (end - HEADER_OFFSET).min(HEADER_MAX);
        header.bytes[header.len..].fill(0);
        Ok(Some(header))
    }

    /// The header's bytes, for the zero page.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub(super) fn u8(&self, offset: usize) -> u8 {
        self.bytes[offset - HEADER_OFFSET]
    }

    pub(super) fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset + 1)])
    }

    pub(super) fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    pub(super) fn u64(&self, offset: usize) -> u64 {
        u64::from(self.u32(offset)) | u64::from(self.u32(offset + 4)) << 32
    }
}
