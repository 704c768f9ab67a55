//! Sets of guest pages.

use std::ops::Range;

/// The page size of page sets in bytes, as in KVM's dirty log. Larger pages may back the memory.
pub const PAGE: u64 = 4096;

/// A set of the pages of a guest's RAM: one bit for each 4 KiB page, region by region.
///
/// A region's bits are laid out as in KVM's dirty log: page `n` is bit `n % 64` of word `n / 64`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    regions: Vec<RegionPages>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct RegionPages {
    pages: u64,
    /// Bits beyond `pages` are clear.
    words: Vec<u64>,
}

/// A bitmap of the wrong length for its region.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("memory region {region}: its page bitmap has {found} words; it must have {needed}")]
pub struct PageSetError {
    /// The index of the region.
    pub region: usize,
    /// The number of words that it must have.
    pub needed: usize,
    /// The number of words that it has.
    pub found: usize,
}

impl PageSet {
    /// The empty set over regions of these sizes in bytes.
    pub fn empty(sizes: impl IntoIterator<Item = u64>) -> Self {
        let region = |size: u64| {
            let pages = size / PAGE;
            RegionPages { pages, words: vec![0; pages.div_ceil(64) as usize] }
        };
        PageSet { regions: sizes.into_iter().map(region).collect() }
    }

    /// The set of all pages of regions of these sizes in bytes.
    pub fn full(sizes: impl IntoIterator<Item = u64>) -> Self {
        let mut set = Self::empty(sizes);
        for region in 0..set.regions.len() {
            set.insert(region, 0..set.pages(region));
        }
        set
    }

    /// The number of regions.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The number of pages of a region, in the set or not.
    pub fn pages(&self, region: usize) -> u64 {
        self.regions[region].pages
    }

    /// Adds pages of a region. Pages beyond its end are ignored.
    pub fn insert(&mut self, region: usize, pages: Range<u64>) {
        self.change(region, pages, |word, mask| *word |= mask);
    }

    /// Removes pages of a region.
    pub fn remove(&mut self, region: usize, pages: Range<u64>) {
        self.change(region, pages, |word, mask| *word &= !mask);
    }

    fn change(&mut self, region: usize, pages: Range<u64>, change: impl Fn(&mut u64, u64)) {
        let region = &mut self.regions[region];
        let end = pages.end.min(region.pages);
        let mut at = pages.start;
        while at < end {
            let bit = at % 64;
            let count = (64 - bit).min(end - at);
            change(&mut region.words[(at / 64) as usize], u64::MAX >> (64 - count) << bit);
            at += count;
        }
    }

    /// Whether a page of a region is in the set.
    pub fn contains(&self, region: usize, page: u64) -> bool {
        let region = &self.regions[region];
        page < region.pages && region.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Adds the pages whose bits are set in `words`, the result of `KVM_GET_DIRTY_LOG` for the
    /// region's memory slot.
    pub fn insert_words(&mut self, region: usize, words: &[u64]) -> Result<(), PageSetError> {
        let own = &mut self.regions[region];
        if own.words.len() != words.len() {
            return Err(PageSetError { region, needed: own.words.len(), found: words.len() });
        }
        for (own, new) in own.words.iter_mut().zip(words) {
            *own |= new;
        }
        let beyond = own.words.len() as u64 * 64 - own.pages;
        if let Some(last) = own.words.last_mut() {
            *last &= u64::MAX >> beyond;
        }
        Ok(())
    }

    /// Adds all pages of `other`, a set over the same regions.
    pub fn insert_all(&mut self, other: &PageSet) {
        self.combine(other, |own, other| own | other);
    }

    /// Removes all pages of `other`, a set over the same regions.
    pub fn remove_all(&mut self, other: &PageSet) {
        self.combine(other, |own, other| own & !other);
    }

    fn combine(&mut self, other: &PageSet, combine: impl Fn(u64, u64) -> u64) {
        assert_eq!(self.regions.len(), other.regions.len(), "sets of one guest's pages");
        for (own, other) in self.regions.iter_mut().zip(&other.regions) {
            assert_eq!(own.pages, other.pages, "sets of one guest's pages");
            for (own, other) in own.words.iter_mut().zip(&other.words) {
                *own = combine(*own, *other);
            }
        }
    }

    /// The number of pages in the set.
    pub fn count(&self) -> u64 {
        self.regions.iter().flat_map(|r| &r.words).map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(|r| r.words.iter().all(|w| *w == 0))
    }

    /// The pages of a region that are in the set, as maximal runs in order.
    pub fn runs(&self, region: usize) -> Runs<'_> {
        Runs { region: &self.regions[region], at: 0 }
    }
}

/// The iterator of [`PageSet::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    region: &'a RegionPages,
    at: u64,
}

impl Runs<'_> {
    /// The first page from `at` whose bit is `wanted`, or the end.
    fn seek(&self, at: u64, wanted: bool) -> u64 {
        let mut at = at;
        while at < self.region.pages {
            let word = self.region.words[(at / 64) as usize];
            let rest = if wanted { word } else { !word } >> (at % 64);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(self.region.pages);
            }
            at = (at / 64 + 1) * 64;
        }
        self.region.pages
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.seek(self.at, true);
        if start == self.region.pages {
            return None;
        }
        self.at = self.seek(start, false);
        Some(start..self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn bitmap_of_wrong_length_is_refused() {
        let mut set = PageSet::empty([65 * PAGE]);
        let error = set.insert_words(0, &[1]).unwrap_err();
        assert_eq!(error.to_string(), "memory region 0: its page bitmap has 1 words; it must have 2");
    }

    #[test]
    fn bits_beyond_the_region_are_ignored() {
        let mut set = PageSet::empty([65 * PAGE]);
        set.insert_words(0, &[u64::MAX, u64::MAX]).unwrap();
        assert_eq!(set, PageSet::full([65 * PAGE]));
        assert_eq!(set.count(), 65);
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            pages in 1u64..300,
            acts in proptest::collection::vec((any::<bool>(), 0u64..320, 0u64..130), 0..20),
        ) {
            let mut set = PageSet::empty([PAGE, pages * PAGE]);
            let mut model = BTreeSet::new();
            for (insert, start, len) in acts {
                let range = start..start + len;
                if insert {
                    set.insert(1, range.clone());
                    model.extend(range.filter(|p| *p < pages));
                } else {
                    set.remove(1, range.clone());
                    model.retain(|p| !range.contains(p));
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert!((0..320).all(|p| set.contains(1, p) == model.contains(&p)));
            let runs: Vec<_> = set.runs(1).collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start));
            prop_assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(set.runs(0).count(), 0);
        }
    }
}
