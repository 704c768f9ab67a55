//! Reads boot files, and writes to guest memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::error::BootError;
use crate::layout;

/// Writes into the first MiB, which is RAM in every guest that boots.
pub(super) fn write_boot_data(ram: &GuestRam, addr: u64, data: &[u8]) {
    debug_assert!(addr + data.len() as u64 <= layout::HIGH_RAM);
    ram.memory().write_slice(data, GuestAddress(addr)).expect("the first MiB is RAM");
}

/// The length of a file or block device.
pub(super) fn file_len(file: &mut File, what: &'static str) -> Result<u64, BootError> {
    file.seek(SeekFrom::End(0)).map_err(|source| BootError::Read { what, source })
}

/// Reads all of `data` from a file. `what` names the file in errors.
pub(super) fn read_at(
    file: &mut File,
    offset: u64,
    data: &mut [u8],
    what: &'static str,
) -> Result<(), BootError> {
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(data))
        .map_err(|source| BootError::Read { what, source })
}

/// Copies `len` bytes of a file into guest memory. The caller has checked that the range is RAM.
pub(super) fn copy_to_guest(
    ram: &GuestRam,
    file: &mut File,
    offset: u64,
    addr: u64,
    len: u64,
    what: &'static str,
) -> Result<(), BootError> {
    debug_assert!(ram.contains(addr, len));
    ram.populate(addr, len)?;
    let failed = |source| BootError::Read { what, source };
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let mut guest = ram.memory().get_slice(GuestAddress(addr), len as usize).expect("the caller checked");
    vm_memory::ReadVolatile::read_exact_volatile(file, &mut guest)
        .map_err(|e| std::io::Error::other(e.to_string()))
        .map_err(failed)
}
