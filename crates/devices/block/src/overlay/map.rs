//! The map of an overlay: which sectors are allocated, one bit for each sector of 512 bytes.
//!
//! One bit per sector, and not per cluster, makes every write a plain write: nothing is read,
//! merged and written back, so overlapping requests need no order. The map costs 256 KiB per GiB,
//! but only where the guest wrote: a page of the map covers 16 MiB of the disk, and pages that are
//! all clear or all set need no memory.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::RangeInclusive;

/// Bytes of a page of the map, in memory and in the file.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Sectors of a page.
pub(crate) const PAGE_SECTORS: u64 = PAGE_BYTES * 8;
const PAGE_WORDS: usize = (PAGE_BYTES / 8) as usize;

#[derive(Debug, Clone)]
enum Page {
    Clear,
    Set,
    Mixed(Box<[u64; PAGE_WORDS]>),
}

/// One bit for each sector.
#[derive(Debug, Clone)]
pub(crate) struct Map {
    pages: Vec<Page>,
    sectors: u64,
}

impl Map {
    /// A map of `sectors` sectors, all clear.
    pub(crate) fn new(sectors: u64) -> Self {
        let pages = sectors.div_ceil(PAGE_SECTORS) as usize;
        Map { pages: vec![Page::Clear; pages], sectors }
    }

    /// The bit of `sector`, and the number of sectors from there on with the same bit. At most
    /// `max`, which is not 0 and does not reach past the end.
    pub(crate) fn run(&self, sector: u64, max: u64) -> (bool, u64) {
        debug_assert!(max > 0 && sector + max <= self.sectors);
        let (mut at, end) = (sector, sector + max);
        let mut first = None;
        while at < end {
            let page_end = end.min((at / PAGE_SECTORS + 1) * PAGE_SECTORS);
            let (bit, to) = match &self.pages[(at / PAGE_SECTORS) as usize] {
                Page::Clear => (false, page_end),
                Page::Set => (true, page_end),
                Page::Mixed(words) => run_in_page(words, at, page_end),
            };
            if *first.get_or_insert(bit) != bit {
                break;
            }
            at = to;
            if to < page_end {
                break;
            }
        }
        (first.unwrap_or(false), at - sector)
    }

    /// Whether all `count` sectors from `sector` are set.
    pub(crate) fn all_set(&self, sector: u64, count: u64) -> bool {
        self.run(sector, count) == (true, count)
    }

    /// Sets the bits of `count` sectors from `sector`.
    pub(crate) fn set(&mut self, sector: u64, count: u64) {
        debug_assert!(sector + count <= self.sectors);
        let (mut at, end) = (sector, sector + count);
        while at < end {
            let page_start = at / PAGE_SECTORS * PAGE_SECTORS;
            let to = end.min(page_start + PAGE_SECTORS);
            let page = &mut self.pages[(at / PAGE_SECTORS) as usize];
            set_in_page(page, (at - page_start) as usize, (to - page_start) as usize);
            at = to;
        }
    }

    /// Number of pages.
    pub(crate) fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// The bytes of `words` of page `page`, as they are in the file.
    pub(crate) fn bytes(&self, page: u64, words: RangeInclusive<u16>) -> Box<[u8]> {
        let (first, last) = (usize::from(*words.start()), usize::from(*words.end()));
        match &self.pages[page as usize] {
            Page::Clear => vec![0; (last - first + 1) * 8].into(),
            Page::Set => vec![0xff; (last - first + 1) * 8].into(),
            Page::Mixed(all) => all[first..=last].iter().flat_map(|word| word.to_le_bytes()).collect(),
        }
    }

    /// Sets the bits of page `page` that are set in `bytes`, its form in the file.
    pub(crate) fn merge(&mut self, page: u64, bytes: &[u8; PAGE_BYTES as usize]) {
        let beyond = (self.sectors - page * PAGE_SECTORS).min(PAGE_SECTORS) as usize;
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let mut word = u64::from_le_bytes(word.try_into().expect("chunks of 8"));
            // The last page may have bits for sectors past the end of the disk.
            let valid = beyond.saturating_sub(index * 64);
            if valid < 64 {
                word &= (1 << valid) - 1;
            }
            while word != 0 {
                let start = word.trailing_zeros() as usize;
                let count = (word >> start).trailing_ones() as usize;
                let sector = page * PAGE_SECTORS + (index * 64 + start) as u64;
                self.set(sector, count as u64);
                word &= (u64::MAX.checked_shl((start + count) as u32)).unwrap_or(0);
            }
        }
    }
}

/// Whether `sector` is allocated, and the number of sectors from there on for which that is the
/// same. At most `max`. Sectors past those of the disk below always count as allocated.
pub(crate) fn layer_run(map: &Map, backing_sectors: u64, sector: u64, max: u64) -> (bool, u64) {
    if sector >= backing_sectors { (true, max) } else { map.run(sector, max.min(backing_sectors - sector)) }
}

/// The bit of sector `at`, and the first sector with another one. At most `end`, in the same page.
fn run_in_page(words: &[u64; PAGE_WORDS], at: u64, end: u64) -> (bool, u64) {
    let page_start = at / PAGE_SECTORS * PAGE_SECTORS;
    let (first, end) = ((at - page_start) as usize, (end - page_start) as usize);
    let bit = words[first / 64] >> (first % 64) & 1 == 1;
    let mut at = first;
    while at < end {
        let word = words[at / 64] >> (at % 64);
        let same = if bit { word.trailing_ones() } else { word.trailing_zeros() } as usize;
        let to_word_end = 64 - at % 64;
        if same < to_word_end {
            at += same;
            break;
        }
        at += to_word_end;
    }
    (bit, page_start + at.min(end) as u64)
}

/// Sets the bits `from..to` of a page.
fn set_in_page(page: &mut Page, from: usize, to: usize) {
    if (from, to) == (0, PAGE_SECTORS as usize) {
        *page = Page::Set;
    }
    if let Page::Clear = page {
        *page = Page::Mixed(Box::new([0; PAGE_WORDS]));
    }
    let Page::Mixed(words) = page else { return };
    let mut at = from;
    while at < to {
        let count = (64 - at % 64).min(to - at);
        words[at / 64] |= (u64::MAX >> (64 - count)) << (at % 64);
        at += count;
    }
    // Checked only when it may have become true: once the first word of this write is full.
    if words[from / 64] == u64::MAX && words.iter().all(|&word| word == u64::MAX) {
        *page = Page::Set;
    }
}

/// The words of the map that one copy of it in the file lacks.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dirty {
    /// By page: the first and the last word.
    pages: BTreeMap<u64, (u16, u16)>,
}

impl Dirty {
    /// Marks the words of `count` sectors from `sector`.
    pub(crate) fn mark(&mut self, sector: u64, count: u64) {
        let (mut at, end) = (sector, sector + count);
        while at < end {
            let page = at / PAGE_SECTORS;
            let to = end.min((page + 1) * PAGE_SECTORS);
            let word = |sector: u64| (sector % PAGE_SECTORS / 64) as u16;
            self.mark_words(page, word(at)..=word(to - 1));
            at = to;
        }
    }

    /// Marks `words` of page `page`.
    pub(crate) fn mark_words(&mut self, page: u64, words: RangeInclusive<u16>) {
        let (first, last) = words.into_inner();
        match self.pages.entry(page) {
            Entry::Vacant(entry) => {
                entry.insert((first, last));
            }
            Entry::Occupied(mut entry) => {
                let words = entry.get_mut();
                *words = (words.0.min(first), words.1.max(last));
            }
        }
    }

    /// Marks all of page `page`.
    pub(crate) fn mark_page(&mut self, page: u64) {
        self.mark_words(page, 0..=(PAGE_WORDS - 1) as u16);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Whether a word of the `count` sectors from `sector`, at least one, may be marked.
    pub(crate) fn meets(&self, sector: u64, count: u64) -> bool {
        if self.is_empty() {
            return false;
        }
        let (first, last) = (sector / 64, (sector + count - 1) / 64);
        let words = PAGE_SECTORS / 64;
        self.pages.range(first / words..=last / words).any(|(page, &(from, to))| {
            page * words + u64::from(from) <= last && first <= page * words + u64::from(to)
        })
    }

    /// Marks all words of `other`.
    pub(crate) fn merge(&mut self, mut other: Dirty) {
        while let Some((page, words)) = other.pop() {
            self.mark_words(page, words);
        }
    }

    /// Takes one page out: its number and the words.
    pub(crate) fn pop(&mut self) -> Option<(u64, RangeInclusive<u16>)> {
        self.pages.pop_first().map(|(page, (first, last))| (page, first..=last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECTORS: u64 = 3 * PAGE_SECTORS + 100;

    proptest! {
        #[test]
        fn map_agrees_with_a_list_of_bits(
            ranges in prop::collection::vec((0..SECTORS, 1..2 * PAGE_SECTORS), 0..20),
            asked in prop::collection::vec((0..SECTORS, 1..SECTORS), 20),
        ) {
            let mut map = Map::new(SECTORS);
            let mut model = vec![false; SECTORS as usize];
            let mut dirty = Dirty::default();
            for (sector, count) in ranges {
                let count = count.min(SECTORS - sector);
                map.set(sector, count);
                dirty.mark(sector, count);
                model[sector as usize..(sector + count) as usize].fill(true);
            }
            for (sector, max) in asked {
                let max = max.min(SECTORS - sector);
                let bit = model[sector as usize];
                let same = model[sector as usize..(sector + max) as usize].iter().take_while(|&&b| b == bit).count();
                prop_assert_eq!(map.run(sector, max), (bit, same as u64));
                if model[sector as usize..(sector + max) as usize].contains(&true) {
                    prop_assert!(dirty.meets(sector, max));
                }
            }
            // The dirty words written to a file are the whole map.
            let mut file = vec![0u8; (map.page_count() * PAGE_BYTES) as usize];
            while let Some((page, words)) = dirty.pop() {
                let at = (page * PAGE_BYTES) as usize + usize::from(*words.start()) * 8;
                let bytes = map.bytes(page, words);
                file[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            let mut read_back = Map::new(SECTORS);
            for page in 0..map.page_count() {
                let at = (page * PAGE_BYTES) as usize;
                read_back.merge(page, file[at..at + PAGE_BYTES as usize].try_into().unwrap());
            }
            for sector in 0..SECTORS {
                prop_assert_eq!(read_back.run(sector, 1).0, model[sector as usize], "sector {}", sector);
            }
        }
    }

    #[test]
    fn dirty_words_meet_the_sectors_of_their_bits() {
        let mut dirty = Dirty::default();
        assert!(!dirty.meets(0, SECTORS));
        dirty.mark(PAGE_SECTORS + 64, 64);
        assert!(!dirty.meets(0, PAGE_SECTORS + 64));
        assert!(!dirty.meets(PAGE_SECTORS + 128, PAGE_SECTORS));
        assert!(dirty.meets(PAGE_SECTORS + 127, 1));
        assert!(dirty.meets(0, PAGE_SECTORS + 65));
        assert!(dirty.meets(0, 3 * PAGE_SECTORS));
    }

    #[test]
    fn full_page_needs_no_memory() {
        let mut map = Map::new(PAGE_SECTORS);
        for sector in 0..PAGE_SECTORS {
            assert!(!matches!(map.pages[0], Page::Set));
            map.set(sector, 1);
        }
        assert!(matches!(map.pages[0], Page::Set));
    }

    #[test]
    fn bits_past_the_end_of_the_disk_are_ignored() {
        let mut map = Map::new(100);
        map.merge(0, &[0xff; PAGE_BYTES as usize]);
        assert!(map.all_set(0, 100));
        assert_eq!(map.pages.len(), 1);
    }
}
