//! Self-describing data for the disk tests, and its checks.
//!
//! A [`Stream`] is one writer's part of a disk and its endless sequence of writes. The sectors of
//! write `n`, and all their bytes, follow from the stream's seed and `n`. So the number of
//! completed writes tells the content of each sector, in the guest that wrote it, in another guest
//! or on the host.
//!
//! A sector contains its stream, its number and its write; its other bytes follow from these. A
//! torn or misplaced sector, or one of another stream, differs from all that were ever written.

use std::ops::Range;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// The largest write, in sectors.
pub const MOST_SECTORS: u64 = 128;

/// One writer's part of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    /// Its sectors.
    sectors: Range<u64>,
}

/// The content of a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros: never written.
    Blank,
    /// The data of the write with that number.
    Write(u64),
}

impl Stream {
    /// The streams of a disk that `count` writers share.
    pub fn all(seed: u64, disk_sectors: u64, count: u64) -> Vec<Stream> {
        let each = disk_sectors / count;
        let stream = |index| Stream { seed: mix(seed ^ index), sectors: index * each..(index + 1) * each };
        (0..count).map(stream).collect()
    }

    /// Its part of the disk.
    pub fn sectors(&self) -> Range<u64> {
        self.sectors.clone()
    }

    /// The sectors of write `n`. Most writes are small.
    pub fn write(&self, n: u64) -> Range<u64> {
        let random = mix(self.seed ^ mix(n));
        let most = if random.is_multiple_of(8) { MOST_SECTORS } else { 8 };
        let size = self.sectors.end - self.sectors.start;
        let count = (1 + (random >> 8) % most).min(size);
        let first = self.sectors.start + (random >> 24) % (size - count + 1);
        first..first + count
    }

    /// The bytes of `sectors` after write `n`.
    pub fn fill(&self, sectors: Range<u64>, n: u64, bytes: &mut [u8]) {
        for (sector, bytes) in sectors.zip(bytes.chunks_exact_mut(SECTOR)) {
            let mut words = self.words(sector, n);
            for bytes in bytes.chunks_exact_mut(8) {
                bytes.copy_from_slice(&words.next().expect("they do not end").to_le_bytes());
            }
        }
    }

    /// The content of a sector; an error if it is not that of any write.
    pub fn read(&self, sector: u64, bytes: &[u8]) -> Result<Content, String> {
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(Content::Blank);
        }
        let word = |index: usize| {
            let bytes = bytes[8 * index..8 * index + 8].try_into().expect("it is eight bytes");
            u64::from_le_bytes(bytes)
        };
        let n = word(2);
        let differs =
            self.words(sector, n).take(SECTOR / 8).enumerate().find(|&(index, right)| word(index) != right);
        if let Some((index, right)) = differs {
            let (found, claims) = (word(index), word(1));
            return Err(format!(
                "sector {sector} is torn or foreign: it claims to be sector {claims} after write {n}, and its \
                 word {index} is {found:#x}, not {right:#x}"
            ));
        }
        if !self.write(n).contains(&sector) {
            return Err(format!("sector {sector} claims to be of write {n}, which did not touch it"));
        }
        Ok(Content::Write(n))
    }

    /// The content of each of its sectors after the first `count` writes.
    pub fn after(&self, count: u64) -> Vec<Content> {
        let mut contents = vec![Content::Blank; (self.sectors.end - self.sectors.start) as usize];
        for n in 0..count {
            self.note(n, &mut contents);
        }
        contents
    }

    /// Applies write `n` to `contents`.
    pub fn note(&self, n: u64, contents: &mut [Content]) {
        for sector in self.write(n) {
            contents[(sector - self.sectors.start) as usize] = Content::Write(n);
        }
    }

    /// Checks its part of a disk after at least `count` writes: each sector must have the data of
    /// those writes or of a later one. `read` reads from the sector in its first argument into its
    /// second. Returns the number of sectors with data.
    pub fn check(
        &self,
        count: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> std::io::Result<()>,
    ) -> Result<usize, String> {
        let least = self.after(count);
        let mut held = 0;
        let mut bytes = vec![0; MOST_SECTORS as usize * SECTOR];
        for first in self.sectors().step_by(MOST_SECTORS as usize) {
            let sectors = first..self.sectors.end.min(first + MOST_SECTORS);
            let bytes = &mut bytes[..(sectors.end - sectors.start) as usize * SECTOR];
            read(first, bytes).map_err(|error| format!("cannot read from sector {first} on: {error}"))?;
            for (sector, bytes) in sectors.zip(bytes.chunks_exact(SECTOR)) {
                let content = self.read(sector, bytes)?;
                let least = least[(sector - self.sectors.start) as usize];
                if content < least {
                    return Err(format!("sector {sector} holds {content:?}: {least:?} is lost"));
                }
                held += usize::from(content != Content::Blank);
            }
        }
        Ok(held)
    }

    /// The 64-bit words of a sector after write `n`, and more.
    fn words(&self, sector: u64, n: u64) -> impl Iterator<Item = u64> {
        let head = [!self.seed, sector, n];
        let mut state = mix(self.seed ^ mix(sector ^ mix(n)));
        let rest = std::iter::repeat_with(move || {
            state = state.wrapping_add(GOLDEN);
            state ^ state.rotate_left(29)
        });
        head.into_iter().chain(rest)
    }
}

impl PartialOrd for Content {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Content {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let age = |content: &Content| match content {
            Content::Blank => None,
            Content::Write(n) => Some(*n),
        };
        age(self).cmp(&age(other))
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Hashes a number (the finalizer of `splitmix64`).
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(GOLDEN);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 1000;

    /// A disk in memory.
    struct Disk(Vec<u8>);

    impl Disk {
        fn new() -> Disk {
            Disk(vec![0; SECTORS as usize * SECTOR])
        }

        fn at(&mut self, sectors: Range<u64>) -> &mut [u8] {
            &mut self.0[sectors.start as usize * SECTOR..sectors.end as usize * SECTOR]
        }

        fn make(&mut self, stream: &Stream, writes: Range<u64>) {
            for n in writes {
                let sectors = stream.write(n);
                stream.fill(sectors.clone(), n, self.at(sectors));
            }
        }

        fn check(&self, stream: &Stream, count: u64) -> Result<usize, String> {
            stream.check(count, |sector, bytes| {
                let start = sector as usize * SECTOR;
                bytes.copy_from_slice(&self.0[start..start + bytes.len()]);
                Ok(())
            })
        }
    }

    #[test]
    fn written_data_is_accepted() {
        let streams = Stream::all(7, SECTORS, 2);
        let mut disk = Disk::new();
        for stream in &streams {
            disk.make(stream, 0..300);
        }
        for stream in &streams {
            assert!(disk.check(stream, 300).unwrap() > 400);
            // Later writes may be there too.
            disk.check(stream, 100).unwrap();
        }
    }

    #[test]
    fn a_lost_write_is_detected() {
        let stream = &Stream::all(7, SECTORS, 1)[0];
        let mut disk = Disk::new();
        disk.make(stream, 0..50);
        disk.make(stream, 51..52);
        let error = disk.check(stream, 52).unwrap_err();
        assert!(error.contains("Write(50) is lost"), "{error}");
    }

    #[test]
    fn a_torn_or_misplaced_sector_is_detected() {
        let streams = Stream::all(7, SECTORS, 2);
        let fresh = || {
            let mut disk = Disk::new();
            disk.make(&streams[0], 0..300);
            disk
        };
        let mut torn = fresh();
        let sector = streams[0].write(299).start;
        torn.at(sector..sector + 1)[256..].fill(0);
        assert!(torn.check(&streams[0], 0).unwrap_err().contains("torn or foreign"));

        let mut misplaced = fresh();
        let bytes = misplaced.at(sector..sector + 1).to_vec();
        misplaced.at(sector + 1..sector + 2).copy_from_slice(&bytes);
        assert!(misplaced.check(&streams[0], 0).unwrap_err().contains(&format!("sector {}", sector + 1)));

        let mut foreign = fresh();
        streams[1].fill(sector..sector + 1, 3, foreign.at(sector..sector + 1));
        assert!(foreign.check(&streams[0], 0).is_err());
    }

    #[test]
    fn writes_stay_in_their_stream() {
        for stream in Stream::all(3, SECTORS, 3) {
            for n in 0..2000 {
                let write = stream.write(n);
                assert!(!write.is_empty() && write.end - write.start <= MOST_SECTORS);
                assert!(stream.sectors().start <= write.start && write.end <= stream.sectors().end);
            }
        }
    }
}
