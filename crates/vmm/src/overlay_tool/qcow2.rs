//! Writes a disk image in the qcow2 format, version 3, in one pass and without a backing file.
//!
//! ```text
//! cluster 0        1 ..              ..                  ..          ..          ..
//! +--------+----------------+-----------------+----------+-----------+----------------+
//! | header | refcount table | refcount blocks | L1 table | L2 tables | data, in order |
//! +--------+----------------+-----------------+----------+-----------+----------------+
//! ```
//!
//! The caller names the clusters that have data, so that the place of everything is known before
//! the first byte is written. All other clusters read as zeros. The header is written last: a file
//! without it is no qcow2 image.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes of a cluster.
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
/// The header's length in version 3, without extensions.
const HEADER_LEN: u32 = 104;
/// Reference counts have 2^4 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Entries of one cluster of the L1 table, an L2 table or the refcount table.
const ENTRIES: u64 = CLUSTER / 8;
/// Reference counts of one refcount block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// In an L1 or L2 entry: the cluster has a reference count of exactly one.
const COPIED: u64 = 1 << 63;

/// Where everything is, in clusters from the start of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    refcount_table: u64,
    refcount_table_len: u64,
    refcount_blocks: u64,
    refcount_blocks_len: u64,
    l1: u64,
    /// Entries of the L1 table.
    l1_entries: u64,
    l2: u64,
    data: u64,
    /// Clusters of the whole file.
    end: u64,
}

impl Layout {
    fn new(size: u64, l2_tables: u64, data_clusters: u64) -> Self {
        let l1_entries = size.div_ceil(CLUSTER).div_ceil(ENTRIES);
        let rest = 1 + l1_entries.div_ceil(ENTRIES) + l2_tables + data_clusters;
        // The refcount clusters count themselves.
        let (mut table_len, mut blocks_len) = (1, 1);
        loop {
            let blocks = (rest + table_len + blocks_len).div_ceil(REFCOUNTS);
            let table = blocks.div_ceil(ENTRIES);
            if (table, blocks) == (table_len, blocks_len) {
                break;
            }
            (table_len, blocks_len) = (table, blocks);
        }
        let refcount_blocks = 1 + table_len;
        let l1 = refcount_blocks + blocks_len;
        let l2 = l1 + l1_entries.div_ceil(ENTRIES);
        let data = l2 + l2_tables;
        Layout {
            refcount_table: 1,
            refcount_table_len: table_len,
            refcount_blocks,
            refcount_blocks_len: blocks_len,
            l1,
            l1_entries,
            l2,
            data,
            end: data + data_clusters,
        }
    }
}

/// Writes a disk of `size` bytes to the empty `file`.
///
/// `clusters` are the indices of the clusters with data: ascending ranges that do not overlap.
/// `read` fills a buffer of [`CLUSTER`] bytes with the contents of one. Bytes past the end of the
/// disk must be zeros.
pub(super) fn write(
    file: &File,
    size: u64,
    clusters: &[Range<u64>],
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    // The L2 tables that have entries, by their index in the L1 table.
    let tables: BTreeSet<u64> = clusters
        .iter()
        .filter(|range| !range.is_empty())
        .flat_map(|range| range.start / ENTRIES..=(range.end - 1) / ENTRIES)
        .collect();
    let data_clusters = clusters.iter().map(|range| range.end - range.start).sum();
    let layout = Layout::new(size, tables.len() as u64, data_clusters);
    file.set_len(layout.end * CLUSTER)?;
    write_refcounts(file, &layout)?;
    let mut l1 = vec![0u64; layout.l1_entries as usize];
    for (place, table) in (layout.l2..).zip(&tables) {
        l1[*table as usize] = place * CLUSTER | COPIED;
    }
    file.write_all_at(&big_endian(&l1), layout.l1 * CLUSTER)?;
    let mut mapped = clusters.iter().cloned().flatten().peekable();
    let mut place = layout.data;
    let mut data = vec![0; CLUSTER as usize];
    for (l2_place, table) in (layout.l2..).zip(tables) {
        let mut l2 = vec![0u64; ENTRIES as usize];
        while let Some(cluster) = mapped.next_if(|cluster| cluster / ENTRIES == table) {
            read(cluster, &mut data)?;
            file.write_all_at(&data, place * CLUSTER)?;
            l2[(cluster % ENTRIES) as usize] = place * CLUSTER | COPIED;
            place += 1;
        }
        file.write_all_at(&big_endian(&l2), l2_place * CLUSTER)?;
    }
    file.write_all_at(&header(size, &layout), 0)
}

/// Every cluster of the file is used once.
fn write_refcounts(file: &File, layout: &Layout) -> io::Result<()> {
    let table: Vec<u64> =
        (0..layout.refcount_blocks_len).map(|block| (layout.refcount_blocks + block) * CLUSTER).collect();
    file.write_all_at(&big_endian(&table), layout.refcount_table * CLUSTER)?;
    let mut left = layout.end;
    for block in 0..layout.refcount_blocks_len {
        let used = left.min(REFCOUNTS);
        let counts = 1u16.to_be_bytes().repeat(used as usize);
        file.write_all_at(&counts, (layout.refcount_blocks + block) * CLUSTER)?;
        left -= used;
    }
    Ok(())
}

fn header(size: u64, layout: &Layout) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_LEN as usize);
    let u32s = |header: &mut Vec<u8>, values: &[u32]| {
        header.extend(values.iter().flat_map(|value| value.to_be_bytes()));
    };
    let u64s = |header: &mut Vec<u8>, values: &[u64]| {
        header.extend(values.iter().flat_map(|value| value.to_be_bytes()));
    };
    u32s(&mut header, &[MAGIC, VERSION]);
    // No backing file: offset and length.
    u64s(&mut header, &[0]);
    u32s(&mut header, &[0, CLUSTER_BITS]);
    u64s(&mut header, &[size]);
    // No encryption.
    u32s(&mut header, &[0, layout.l1_entries as u32]);
    u64s(&mut header, &[layout.l1 * CLUSTER, layout.refcount_table * CLUSTER]);
    // No internal snapshots: their number, then their offset.
    u32s(&mut header, &[layout.refcount_table_len as u32, 0]);
    u64s(&mut header, &[0]);
    // Incompatible, compatible and autoclear features.
    u64s(&mut header, &[0, 0, 0]);
    u32s(&mut header, &[REFCOUNT_ORDER, HEADER_LEN]);
    header
}

fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an image back as the specification of the format says, without this module's layout.
    fn read_back(file: &File, size: u64) -> Vec<u8> {
        let u32_at = |at| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at).unwrap();
            u32::from_be_bytes(bytes)
        };
        let u64_at = |at| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes)
        };
        assert_eq!((u32_at(0), u32_at(4)), (MAGIC, 3));
        assert_eq!(u64_at(24), size);
        assert_eq!((u32_at(96), u32_at(100)), (4, 104));
        let (l1_len, l1) = (u64::from(u32_at(36)), u64_at(40));
        let refcount = |offset: u64| {
            let cluster = offset / CLUSTER;
            let block = u64_at(u64_at(48) + cluster / 32768 * 8);
            let mut bytes = [0; 2];
            file.read_exact_at(&mut bytes, block + cluster % 32768 * 2).unwrap();
            u16::from_be_bytes(bytes)
        };
        for cluster in 0..file.metadata().unwrap().len() / CLUSTER {
            assert_eq!(refcount(cluster * CLUSTER), 1, "cluster {cluster}");
        }
        let mut disk = vec![0; size.next_multiple_of(CLUSTER) as usize];
        for (index, out) in disk.chunks_mut(CLUSTER as usize).enumerate() {
            let index = index as u64;
            assert!(index / 8192 < l1_len);
            let l2 = u64_at(l1 + index / 8192 * 8) & !COPIED;
            let data = if l2 == 0 { 0 } else { u64_at(l2 + index % 8192 * 8) & !COPIED };
            if data != 0 {
                file.read_exact_at(out, data).unwrap();
            }
        }
        disk.truncate(size as usize);
        disk
    }

    fn fill(cluster: u64, out: &mut [u8]) {
        out.fill(cluster as u8 | 1);
        out[0] = 0x5a;
    }

    #[test]
    fn image_reads_back_as_the_format_says() {
        // Two L2 tables, a hole between them, and a last cluster that is not whole.
        let size = 8200 * CLUSTER + 512;
        let ranges = [0..1, 3..5, 8191..8192, 8199..8201];
        let clusters = [0, 3, 4, 8191, 8199, 8200];
        let file = tempfile::tempfile().unwrap();
        write(&file, size, &ranges, |cluster, out| {
            fill(cluster, out);
            if cluster == 8200 {
                out[512..].fill(0);
            }
            Ok(())
        })
        .unwrap();
        let mut expected = vec![0; (8201 * CLUSTER) as usize];
        for cluster in clusters {
            let at = (cluster * CLUSTER) as usize;
            fill(cluster, &mut expected[at..at + CLUSTER as usize]);
        }
        expected.truncate(size as usize);
        assert!(read_back(&file, size) == expected);
    }

    #[test]
    fn image_of_an_empty_disk_has_no_data() {
        let file = tempfile::tempfile().unwrap();
        write(&file, 1 << 20, &[], |_, _| unreachable!()).unwrap();
        assert!(read_back(&file, 1 << 20).iter().all(|byte| *byte == 0));
        assert_eq!(file.metadata().unwrap().len(), 4 * CLUSTER);
    }

    #[test]
    fn refcounts_count_their_own_clusters() {
        for data in [0, 32_760, 32_763, 32_764, 32_770, 5 * 32_768 * 8192] {
            let layout = Layout::new(1 << 44, 100, data);
            assert!(layout.refcount_blocks_len * REFCOUNTS >= layout.end, "{layout:?}");
            assert!(layout.refcount_table_len * ENTRIES >= layout.refcount_blocks_len, "{layout:?}");
            assert!((layout.refcount_blocks_len - 1) * REFCOUNTS < layout.end, "{layout:?}");
        }
    }

    #[test]
    fn failed_read_leaves_no_image() {
        let file = tempfile::tempfile().unwrap();
        let failed = write(&file, 1 << 20, &[1..2, 4..5], |_, _| Err(io::Error::other("lost")));
        assert_eq!(failed.unwrap_err().to_string(), "lost");
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, 0).unwrap();
        assert_eq!(magic, [0; 4]);
    }
}
