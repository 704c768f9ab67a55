//! Guest buffers for one call on a tap.

use memory::GuestRam;
use memory::iovec::{Access, GuestIoVec, MAX_ENTRIES};
use virtio::queue::{Buffers, QueueError};

/// Most guest buffers in one system call. It takes two more entries: a head and a tail in the
/// monitor's memory.
pub(super) const MAX_BUFFERS: usize = MAX_ENTRIES - 2;

/// Appends each of `buffers` to `list`, as an entry of its own.
pub(super) fn push(
    list: &mut GuestIoVec,
    ram: &GuestRam,
    buffers: &Buffers<'_>,
    access: Access,
) -> Result<(), QueueError> {
    for buffer in buffers.iter() {
        list.push(ram, buffer.addr, buffer.len as usize, access)?;
    }
    Ok(())
}
