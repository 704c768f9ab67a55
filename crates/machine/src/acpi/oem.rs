//! The names in the header of each ACPI table.

/// `OEMID`.
pub(super) const OEM_ID: [u8; 6] = *b"VESTA ";
/// `OEM Revision`.
pub(super) const OEM_REVISION: u32 = 1;
