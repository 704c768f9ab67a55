//! The overlay's file: a header, two maps, and the data.
//!
//! ```text
//! offset          what                                      size
//! 0               header: what the overlay is, never rewritten   4 KiB
//! 4096            session: who writes to it, and how             4 KiB
//! 8192            map A                                       one bit per sector, rounded up to 4 KiB
//! A's end         map B                                       as map A
//! data_offset     data: sector n stands at data_offset + 512 n  virtual_size   (data_offset: the next multiple of 1 MiB)
//! ```
//!
//! All numbers are little-endian. The file is sparse: what was never written takes no space, and a sector that the map has
//! and the data has not reads as zeros. Where each part stands follows from `virtual_size` alone.
//!
//! # The two maps
//!
//! Map A is written by flushes, only after the data that it speaks of is durable, so it is true whatever happens to the host. Map B
//! is written after each change, when the kernel has the data and before the guest hears that the change is over. So it is complete at any moment,
//! and true as long as the host does not lose its page cache: it keeps what the guest wrote when only the monitor dies. An overlay holds the sectors of map
//! A, and those of map B if map B can be trusted: the last session was closed in order (then all is durable, where flushes wait for the disk), or
//! the host has not been started again since, or the session said from the start that it does not wait for disks (`cache_type` Unsafe).
//!
//! A session begins with the first change: until it says so, nothing is changed but map A, by what map B knows.
//!
//! # After a failed sync
//!
//! Once a sync fails, map B speaks of sectors that the host may lose at any time, for it takes them for written. So neither map is written
//! any more, the session is never closed, and it is given the start [`HostBoot::INVALID`](super::file::HostBoot::INVALID), which is no start of any host. Whoever
//! opens the overlay next believes map A alone, as after a crash of the host, on this host as well: what the guest had flushed. Where map B was all there
//! was when the overlay was opened (its writer did not wait for disks), map A would be no disk at all: then the state is [`UNKNOWN`].

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::map::{PAGE_BYTES, PAGE_SECTORS};
use crate::SECTOR;

/// The first bytes of an overlay.
pub(crate) const MAGIC: [u8; 8] = *b"VESTAOVL";
/// The version of the format that is written here, and the only one that is read.
pub(crate) const VERSION: u32 = 1;
/// Where the session stands.
pub(crate) const SESSION_OFFSET: u64 = 4096;
/// Where map A stands.
pub(crate) const MAP_OFFSET: u64 = 8192;
/// What the data is aligned to.
const DATA_ALIGNMENT: u64 = 1 << 20;
/// Most bytes of a disk that an overlay can stand for: 16 TiB. Its map has 4 GiB then.
pub(crate) const MAX_VIRTUAL_SIZE: u64 = 16 << 40;

/// What an overlay lies on, as far as it must be told from other things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BackingId {
    /// Size in bytes, a multiple of 512.
    pub(crate) size: u64,
    /// The overlay beneath, or zeros.
    pub(crate) uuid: [u8; 16],
    /// How many sessions have written to the overlay beneath.
    pub(crate) sessions: u64,
    /// CRC-32 of its first and last 64 KiB.
    pub(crate) fingerprint: u32,
}

/// Which overlay something is, for the one that lies on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerId {
    pub(crate) uuid: [u8; 16],
    pub(crate) sessions: u64,
}

/// What an overlay is; written once, when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    /// Bytes per sector of the map: 512.
    pub(crate) block_size: U32,
    /// Size of the disk in bytes, a multiple of 512.
    pub(crate) virtual_size: U64,
    /// A random number that names this overlay.
    pub(crate) uuid: [u8; 16],
    /// Size of what lies beneath, in bytes.
    pub(crate) base_size: U64,
    /// The `uuid` of the overlay beneath; zeros if a plain disk lies beneath.
    pub(crate) base_uuid: [u8; 16],
    /// The `sessions` of the overlay beneath when this one was made: it must not have been written since.
    pub(crate) base_sessions: U64,
    /// CRC-32 of the first and last 64 KiB of what lies beneath.
    pub(crate) base_fingerprint: U32,
    /// CRC-32 of all fields above.
    pub(crate) crc: U32,
}

/// How the overlay was last written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Session {
    /// How many sessions have written to it.
    pub(crate) sessions: U64,
    /// Which start of the host that was in; zeros where that is not known.
    pub(crate) boot_id: [u8; 16],
    /// When that start was, in seconds since 1970.
    pub(crate) boot_time: U64,
    /// [`OPEN`], [`OPEN_UNSAFE`], [`CLOSED`] or [`UNKNOWN`].
    pub(crate) state: U32,
    /// CRC-32 of all fields above.
    pub(crate) crc: U32,
}

/// Open, or not closed in order: map B is true until the host is started again.
pub(crate) const OPEN: u32 = 1;
/// Open by someone who does not wait for disks: map B is all there is.
pub(crate) const OPEN_UNSAFE: u32 = 2;
/// Closed in order: both maps together are true.
pub(crate) const CLOSED: u32 = 3;
/// A sync failed before anything was durable: map B is all there is, and nobody knows whether it is true. (Versions before this state
/// was defined take the session for damaged, and open such an overlay no more than this one.)
pub(crate) const UNKNOWN: u32 = 4;

/// The checksum of a structure whose last four bytes mark_allocated it.
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

    /// Whether the checksum is right and the state is one there is.
    pub(crate) fn is_sealed(&self) -> bool {
        self.crc == checksum(self) && [OPEN, OPEN_UNSAFE, CLOSED, UNKNOWN].contains(&self.state.get())
    }
}

/// Where the parts of an overlay stand, all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Start of map A.
    pub(crate) durable_map: u64,
    /// Start of map B.
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
    fn parts_do_not_overlap_at_any_size() {
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
    fn the_format_on_disk_does_not_change_by_accident() {
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
