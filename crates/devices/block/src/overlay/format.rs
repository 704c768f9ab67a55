//! The format of an overlay file: a header, a session, two maps, and the data.
//!
//! ```text
//! offset       contents                                             size
//! 0            header: what the overlay is; never rewritten         4 KiB
//! 4096         session: who writes to it, and how                   4 KiB
//! 8192         durable map                                          a bit per sector, to 4 KiB
//! after it     commit map                                           as the durable map
//! data_offset  data: sector n is at data_offset + 512 n             virtual_size
//!              (data_offset: the next multiple of 1 MiB)
//! ```
//!
//! All numbers are little-endian. The file is sparse: what was never written takes no space, and an
//! allocated sector in a hole reads as zeros. All offsets follow from `virtual_size` alone.
//!
//! # The two maps
//!
//! A bit is set if its sector is allocated in the overlay.
//!
//! The *durable map* is written by flushes, only after the data of its sectors is durable. So it is
//! true even after a crash of the host.
//!
//! The *commit map* is written after each change, when the kernel has the data and before the
//! guest's request completes. So the two maps together are complete at any moment, and the commit
//! map is true while the host keeps its page cache: it keeps what the guest wrote if only the
//! monitor dies.
//!
//! The overlay has the sectors of the durable map. It also has those of the commit map if
//!
//! - the last session was closed (then all is durable, if flushes wait for the disk), or
//! - the host has not rebooted since, or
//! - the session does not wait for the disk (`cache_type` Unsafe).
//!
//! A session begins with the first change. Before it, nothing is written but the durable map, from
//! the commit map.
//!
//! # After a failed sync
//!
//! After a failed sync the host may lose sectors of the commit map at any time: it takes them for
//! written. So neither map is written any more, and the session is never closed. Its boot becomes
//! [`HostBoot::INVALID`](super::file::HostBoot::INVALID), which matches no boot of any host. The
//! next open, on this host as well, uses the durable map alone: what the guest had flushed. If only
//! the commit map had the contents when the overlay was opened (its writer did not wait for the
//! disk), the durable map would be another disk. Then the state becomes [`UNKNOWN`].

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::map::{PAGE_BYTES, PAGE_SECTORS};
use crate::SECTOR;

/// The first bytes of an overlay file.
pub(crate) const MAGIC: [u8; 8] = *b"VESTAOVL";
/// The version of the format, the only one that is written and read.
pub(crate) const VERSION: u32 = 1;
/// Offset of the session.
pub(crate) const SESSION_OFFSET: u64 = 4096;
/// Offset of the durable map.
pub(crate) const MAP_OFFSET: u64 = 8192;
/// Alignment of the data in the file, in bytes.
const DATA_ALIGNMENT: u64 = 1 << 20;
/// Largest disk of an overlay in bytes: 16 TiB. Its maps are 4 GiB each then.
pub(crate) const MAX_VIRTUAL_SIZE: u64 = 16 << 40;

/// Identifies the disk that an overlay is created on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BackingId {
    /// Size in bytes, a multiple of 512.
    pub(crate) size: u64,
    /// `uuid` of the topmost overlay of that disk, or zeros.
    pub(crate) uuid: [u8; 16],
    /// `sessions` of that overlay.
    pub(crate) sessions: u64,
    /// CRC-32 of the first and last 64 KiB of the disk.
    pub(crate) fingerprint: u32,
}

/// Identifies an overlay, and its state, for those created on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerId {
    pub(crate) uuid: [u8; 16],
    pub(crate) sessions: u64,
}

/// What the overlay is. Written once, when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    /// Bytes per sector of the map: 512.
    pub(crate) block_size: U32,
    /// Size of the disk in bytes, a multiple of 512.
    pub(crate) virtual_size: U64,
    /// Random id of this overlay.
    pub(crate) uuid: [u8; 16],
    /// Size of the disk below, in bytes.
    pub(crate) base_size: U64,
    /// `uuid` of the overlay below; zeros if there is none.
    pub(crate) base_uuid: [u8; 16],
    /// `sessions` of the overlay below when this one was created. It must not have been written
    /// since.
    pub(crate) base_sessions: U64,
    /// CRC-32 of the first and last 64 KiB of the disk below.
    pub(crate) base_fingerprint: U32,
    /// CRC-32 of all fields above.
    pub(crate) crc: U32,
}

/// How the overlay was last written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Session {
    /// Number of sessions that have written to it.
    pub(crate) sessions: U64,
    /// `boot_id` of the host in the last session; zeros if unknown.
    pub(crate) boot_id: [u8; 16],
    /// Time of that boot, in seconds since 1970.
    pub(crate) boot_time: U64,
    /// [`OPEN`], [`OPEN_UNSAFE`], [`CLOSED`] or [`UNKNOWN`].
    pub(crate) state: U32,
    /// CRC-32 of all fields above.
    pub(crate) crc: U32,
}

/// Open, or not closed: the commit map is true until the host reboots.
pub(crate) const OPEN: u32 = 1;
/// Open by a monitor that does not wait for the disk: only the commit map has the contents.
pub(crate) const OPEN_UNSAFE: u32 = 2;
/// Closed: the two maps together are true.
pub(crate) const CLOSED: u32 = 3;
/// A sync failed before anything was durable: only the commit map has the contents, and it may be
/// wrong. (Versions that lack this state take the session for damaged, and refuse the overlay too.)
pub(crate) const UNKNOWN: u32 = 4;

/// The checksum of a structure, which its last four bytes hold.
fn checksum<T: IntoBytes + Immutable>(value: &T) -> U32 {
    let bytes = value.as_bytes();
    crc32fast::hash(&bytes[..bytes.len() - 4]).into()
}

impl Header {
    /// This header with its checksum.
    pub(crate) fn sealed(mut self) -> Self {
        self.crc = checksum(&self);
        self
    }

    /// Whether the checksum is right.
    pub(crate) fn is_sealed(&self) -> bool {
        self.crc == checksum(self)
    }
}

impl Session {
    /// This session with its checksum.
    pub(crate) fn sealed(mut self) -> Self {
        self.crc = checksum(&self);
        self
    }

    /// Whether the checksum is right and the state is defined.
    pub(crate) fn is_sealed(&self) -> bool {
        self.crc == checksum(self) && [OPEN, OPEN_UNSAFE, CLOSED, UNKNOWN].contains(&self.state.get())
    }
}

/// Offsets in an overlay file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Start of the durable map.
    pub(crate) durable_map: u64,
    /// Start of the commit map.
    pub(crate) commit_map: u64,
    /// Start of the data.
    pub(crate) data: u64,
    /// Length of the file.
    pub(crate) file_len: u64,
}

impl Layout {
    /// The layout for a disk of `virtual_size` bytes, at most [`MAX_VIRTUAL_SIZE`].
    pub(crate) fn of(virtual_size: u64) -> Self {
        let map_len = (virtual_size / SECTOR).div_ceil(PAGE_SECTORS) * PAGE_BYTES;
        let commit_map = MAP_OFFSET + map_len;
        let data = (commit_map + map_len).next_multiple_of(DATA_ALIGNMENT);
        Layout { durable_map: MAP_OFFSET, commit_map, data, file_len: data + virtual_size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_do_not_overlap_at_any_size() {
        for size in [0, 512, 16 << 20, (16 << 20) + 512, 1 << 30, MAX_VIRTUAL_SIZE] {
            let layout = Layout::of(size);
            let map_len = (size / SECTOR).div_ceil(8).next_multiple_of(4096);
            assert!(layout.durable_map + map_len <= layout.commit_map);
            assert!(layout.commit_map + map_len <= layout.data);
            assert_eq!(layout.data % DATA_ALIGNMENT, 0);
            assert_eq!(layout.file_len, layout.data + size);
        }
    }

    #[test]
    fn format_on_disk_is_unchanged() {
        assert_eq!(size_of::<Header>(), 80);
        assert_eq!(size_of::<Session>(), 40);
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            block_size: 512.into(),
            virtual_size: 0x0102_0304.into(),
            uuid: [7; 16],
            base_size: 9.into(),
            base_uuid: [8; 16],
            base_sessions: 3.into(),
            base_fingerprint: 0xdead_beef_u32.into(),
            crc: 0.into(),
        }
        .sealed();
        assert!(header.is_sealed());
        assert_eq!([OPEN, OPEN_UNSAFE, CLOSED, UNKNOWN], [1, 2, 3, 4]);
        assert_eq!(header.as_bytes()[16..24], [4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(header.as_bytes()[72..76], [0xef, 0xbe, 0xad, 0xde]);
        let mut broken = header;
        broken.uuid[3] ^= 1;
        assert!(!broken.is_sealed());
    }
}
