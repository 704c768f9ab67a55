//! Data that says where it belongs: what the disk tests write, and how they tell whether it is what should be there.
//!
//! A [`Stream`] is one writer's part of a disk and the endless sequence of writes that it makes there. Which sectors its write `n`
//! touches, and every byte of them, follow from the stream's seed and from `n`. So nothing about a write needs to be kept: whoever
//! knows how many writes were over can tell what each sector must hold, in the guest that wrote, in another, or on the host.
//!
//! A sector names its stream, itself and the write that it comes from, and the rest of it follows from these. A torn sector, one
//! that is in the wrong place, or one of another stream is told from any that was ever written.

use std::ops::Range;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// The most sectors that one write has.
pub const MOST_SECTORS: u64 = 128;

/// One writer's part of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    /// Its sectors.
    sectors: Range<u64>,
}

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros: it was never written.
    Blank,
    /// What the stream's write of that number put there.
    Write(u64),
}

impl Stream {
    /// The streams of a disk of so many sectors that `count` writers share.
    pub fn all(seed: u64, disk_sectors: u64, count: u64) -> Vec<Stream> {
        let each = disk_sectors / count;
        let stream = |index| Stream { seed: mix(seed ^ index), sectors: index * each..(index + 1) * each };
        (0..count).map(stream).collect()
    }

    /// Its part of the disk.
    pub fn sectors(&self) -> Range<u64> {
        self.sectors.clone()
    }

    /// The sectors that its write number `n` touches. Most writes are small.
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

    /// What a sector holds; an error where no write put all of that there.
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

    /// What each of its sectors holds after the first `count` writes.
    pub fn after(&self, count: u64) -> Vec<Content> {
        let mut contents = vec![Content::Blank; (self.sectors.end - self.sectors.start) as usize];
        for n in 0..count {
            self.note(n, &mut contents);
        }
        contents
    }

    /// Notes in `contents` that write `n` is over.
    pub fn note(&self, n: u64, contents: &mut [Content]) {
        for sector in self.write(n) {
            contents[(sector - self.sectors.start) as usize] = Content::Write(n);
        }
    }

    /// Checks its part of a disk, of which `count` writes are known to be over and any later ones may or may not: each sector holds
    /// what those left there, or something newer. `read` fills its second argument from the sector on that its first names.
    /// Returns how many sectors hold something.
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

    /// The words of a sector after write `n`, and more.
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

/// A number that has nothing to do with the one it follows from (the finalizer of `splitmix64`).
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
    fn what_was_written_is_found_to_be_there() {
        let streams = Stream::all(7, SECTORS, 2);
        let mut disk = Disk::new();
        for stream in &streams {
            disk.make(stream, 0..300);
        }
        for stream in &streams {
            assert!(disk.check(stream, 300).unwrap() > 400);
            // Later writes may be there, too.
            disk.check(stream, 100).unwrap();
        }
    }

    #[test]
    fn a_lost_write_is_found() {
        let stream = &Stream::all(7, SECTORS, 1)[0];
        let mut disk = Disk::new();
        disk.make(stream, 0..50);
        disk.make(stream, 51..52);
        let error = disk.check(stream, 52).unwrap_err();
        assert!(error.contains("Write(50) is lost"), "{error}");
    }

    #[test]
    fn a_torn_or_misplaced_or_foreign_sector_is_found() {
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
