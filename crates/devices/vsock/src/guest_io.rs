//! Guest buffers for one call on a host socket.

use memory::GuestRam;
use memory::iovec::{Access, GuestIoVec, MAX_ENTRIES};
use virtio::queue::{Buffers, QueueError};

/// Appends the first bytes of `buffers` to `list`: at most `limit`, and no more entries than one
/// system call takes. Returns the number of bytes.
pub(crate) fn push(
    list: &mut GuestIoVec,
    ram: &GuestRam,
    buffers: &Buffers<'_>,
    limit: u32,
    access: Access,
) -> Result<u32, QueueError> {
    let mut pushed = 0;
    for buffer in buffers.iter() {
        if pushed == limit || list.entries().len() == MAX_ENTRIES {
            break;
        }
        let len = buffer.len.min(limit - pushed);
        list.push(ram, buffer.addr, len as usize, access)?;
        pushed += len;
    }
    Ok(pushed)
}
