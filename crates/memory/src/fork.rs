//! Guest RAM across fork(2).
//!
//! A forked process has the same memory at the same addresses, copy-on-write on both sides. This
//! crate makes only private mappings, and children inherit all of them, together with their advice
//! about huge pages. The kernel copies page tables (one entry for each huge page, or 512 for the
//! same memory in small pages), not pages.
//!
//! Two kinds of memory cannot be forked. [`GuestRam::fork_check`] reports them before anything is
//! paused.

use config::HugePages;

use crate::backing::Backing;
use crate::ram::GuestRam;

/// Why this memory cannot be forked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForkError {
    /// A child's write may find no free page in the pool, and the child would be killed.
    #[error("guest memory: huge_pages 2M cannot be forked; use \"None\" or \"Transparent\"")]
    HugePagePool,
    /// The child has no connection to the server: pages that are not sent yet would be zero.
    #[error(
        "guest memory: memory from a page server cannot be forked: pages that are not sent yet would be lost"
    )]
    PageServer,
}

impl GuestRam {
    /// Checks that the memory can be forked.
    pub fn fork_check(&self) -> Result<(), ForkError> {
        if self.huge_pages() == HugePages::Hugetlbfs2M {
            return Err(ForkError::HugePagePool);
        }
        match self.backing() {
            Backing::PageServer(_) => Err(ForkError::PageServer),
            Backing::Anonymous | Backing::File(_) => Ok(()),
        }
    }

    /// Records that this process is about to be forked. From now on, in parent and child, the image
    /// that the memory was restored from may have another user, and is never written in place.
    pub fn note_fork(&self) {
        self.set_shared();
    }
}
