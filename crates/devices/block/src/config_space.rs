//! The configuration space (5.2.4), and the feature bits that make its fields valid.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::SECTOR;
use super::request::{MAX_BUFFER, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS};
use virtio::device::ConfigField;

/// Feature bits of a block device (5.2.3).
pub(crate) mod feature {
    /// `size_max` is valid.
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` is valid.
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub(crate) const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    /// The driver may flush. Without it, every write is durable before it completes.
    pub(crate) const FLUSH: u64 = 1 << 9;
    /// `topology` is valid.
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    /// `num_queues` is valid.
    pub(crate) const MQ: u64 = 1 << 12;
    /// The driver may discard.
    pub(crate) const DISCARD: u64 = 1 << 13;
    /// The driver may write zeroes.
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Sectors of a host page, the unit of the page cache. Guests align to it where they can.
const SECTORS_PER_PAGE: u32 = 8;
/// Binary logarithm of [`SECTORS_PER_PAGE`].
const SECTORS_PER_PAGE_EXP: u8 = 3;
/// Most data segments of one request, if the queue has as many descriptors.
const SEG_MAX: u32 = 254;

/// `struct virtio_blk_config`.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ConfigSpace {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

impl ConfigSpace {
    /// The configuration space of a disk of `size` bytes with `num_queues` queues of `queue_size`
    /// descriptors.
    pub(crate) fn new(size: u64, num_queues: u16, queue_size: u16) -> Self {
        ConfigSpace {
            capacity: (size / SECTOR).into(),
            size_max: MAX_BUFFER.into(),
            // Header and status take a descriptor each.
            seg_max: SEG_MAX.min(u32::from(queue_size) - 2).into(),
            geometry: [0; 4],
            blk_size: (SECTOR as u32).into(),
            physical_block_exp: SECTORS_PER_PAGE_EXP,
            alignment_offset: 0,
            min_io_size: 1.into(),
            opt_io_size: 0.into(),
            writeback: 0,
            unused0: 0,
            num_queues: num_queues.into(),
            max_discard_sectors: MAX_DISCARD_SECTORS.into(),
            max_discard_seg: MAX_RANGES.into(),
            discard_sector_alignment: SECTORS_PER_PAGE.into(),
            max_write_zeroes_sectors: MAX_ZEROES_SECTORS.into(),
            max_write_zeroes_seg: MAX_RANGES.into(),
            write_zeroes_may_unmap: 1,
            unused1: [0; 3],
        }
    }
}

/// The fields that exist only with a feature. Topology is a hint: Unikraft's driver reads
/// `blk_size` as 8 bytes before it accepts any feature, and takes the topology for the upper half.
pub(crate) const FIELDS: [ConfigField; 7] = [
    ConfigField::new(8..12, feature::SIZE_MAX),
    ConfigField::new(12..16, feature::SEG_MAX),
    ConfigField::new(20..24, feature::BLK_SIZE),
    ConfigField { bytes: 24..32, feature: feature::TOPOLOGY, hint: true },
    ConfigField::new(34..36, feature::MQ),
    ConfigField::new(36..48, feature::DISCARD),
    ConfigField::new(48..57, feature::WRITE_ZEROES),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn fields_are_at_the_offsets_of_the_specification() {
        assert_eq!(offset_of!(ConfigSpace, size_max), 8);
        assert_eq!(offset_of!(ConfigSpace, seg_max), 12);
        assert_eq!(offset_of!(ConfigSpace, blk_size), 20);
        assert_eq!(offset_of!(ConfigSpace, physical_block_exp), 24);
        assert_eq!(offset_of!(ConfigSpace, writeback), 32);
        assert_eq!(offset_of!(ConfigSpace, num_queues), 34);
        assert_eq!(offset_of!(ConfigSpace, max_discard_sectors), 36);
        assert_eq!(offset_of!(ConfigSpace, discard_sector_alignment), 44);
        assert_eq!(offset_of!(ConfigSpace, max_write_zeroes_sectors), 48);
        assert_eq!(offset_of!(ConfigSpace, write_zeroes_may_unmap), 56);
        assert_eq!(size_of::<ConfigSpace>(), 60);
    }

    #[test]
    fn conditional_fields_match_the_specification() {
        let starts = FIELDS.map(|field| field.bytes.start as usize);
        let want = [
            offset_of!(ConfigSpace, size_max),
            offset_of!(ConfigSpace, seg_max),
            offset_of!(ConfigSpace, blk_size),
            offset_of!(ConfigSpace, physical_block_exp),
            offset_of!(ConfigSpace, num_queues),
            offset_of!(ConfigSpace, max_discard_sectors),
            offset_of!(ConfigSpace, max_write_zeroes_sectors),
        ];
        assert_eq!(starts, want);
    }

    #[test]
    fn small_queue_limits_the_segments_of_a_request() {
        assert_eq!(ConfigSpace::new(0, 1, 16).seg_max.get(), 14);
        assert_eq!(ConfigSpace::new(0, 1, 1024).seg_max.get(), SEG_MAX);
    }
}
