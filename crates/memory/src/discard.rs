//! Returning guest pages to the host, as a balloon does.

use crate::backing::Backing;
use crate::pages::PAGE;
use crate::ram::GuestRam;

/// Why pages could not be returned.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// The range is not whole pages of one region.
    #[error("guest memory {addr:#x}: {len:#x} bytes are not whole pages of RAM ({page_size} bytes each)")]
    Range {
        /// First guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
        /// Size of a page in bytes.
        page_size: u64,
    },
    /// The kernel refused.
    #[error("guest memory {addr:#x}: cannot return {len:#x} bytes to the host: {source}")]
    Kernel {
        /// First guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

impl GuestRam {
    /// Returns the pages of a range to the host, as a balloon does. They use no memory and read as
    /// zero, even if they came from an image. The range must be whole pages ([`Self::page_size`])
    /// of one region. The pages count as written by the monitor.
    ///
    /// A page server is notified by `UFFD_EVENT_REMOVE`, and the call blocks until the server has
    /// read the event.
    pub fn discard(&self, addr: u64, len: u64) -> Result<(), DiscardError> {
        let page_size = self.page_size();
        let index = self.regions().iter().position(|r| r.guest_addr <= addr && addr - r.guest_addr < r.size);
        let bad_range = || DiscardError::Range { addr, len, page_size };
        let index = index.filter(|_| self.contains(addr, len)).ok_or_else(bad_range)?;
        if !addr.is_multiple_of(page_size) || !len.is_multiple_of(page_size) {
            return Err(bad_range());
        }
        if len == 0 {
            return Ok(());
        }
        let start = addr - self.regions()[index].guest_addr;
        let part = self.spans()[index].subspan(start..start + len);
        // Mark first: a marked page that keeps its contents is written once too often. An unmarked
        // page that lost them would be missing from the next Diff.
        self.mark_written(index, start, len);
        self.add_discarded(index, start / PAGE..(start + len) / PAGE);
        let done = match self.backing() {
            // Dropping only the pages would bring back the file's contents.
            Backing::File(_) => part.remap_anonymous(),
            Backing::Anonymous | Backing::PageServer(_) => part.drop_pages(),
        };
        done.map_err(|e| DiscardError::Kernel { addr, len, source: e.into() })
    }
}

#[cfg(test)]
mod tests {
    use config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn discarded_pages_count_as_written_and_are_zero() {
        let ram = GuestRam::map(16, HugePages::None, true).unwrap();
        ram.memory().write_obj(7u8, GuestAddress(PAGE)).unwrap();
        ram.reset_monitor_dirty_pages();
        ram.discard(PAGE, 2 * PAGE).unwrap();
        let dirty: Vec<_> = ram.take_monitor_dirty_pages().unwrap().runs(0).flatten().collect();
        assert_eq!(dirty, [1, 2]);
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(PAGE)).unwrap(), 0);
    }

    #[test]
    fn discard_takes_only_whole_pages_of_ram() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        for (addr, len) in [(1, PAGE), (0, 1), (16 << 20, PAGE), (0, 17 << 20), (PAGE, u64::MAX - 4095)] {
            assert!(ram.discard(addr, len).is_err(), "{addr:#x} {len:#x}");
        }
    }
}
