//! What fork(2) does to guest RAM.
//!
//! A forked process has the same memory at the same addresses, copy-on-write on both sides: private mappings are all that this
//! room makes, and none of them is kept from children. Advice about huge pages is inherited. The kernel copies page tables
//! (one entry for each huge page, 512 times as many for small ones), not pages.
//!
//! Two kinds of memory cannot be forked, and [`GuestRam::fork_check`] says so while everything still runs.

use config::HugePages;

use crate::backing::Backing;
use crate::ram::GuestRam;

/// Why this memory cannot be forked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForkError {
    /// A child's write would need a page that the pool need not have, and be killed.
    #[error(
        "memory of 2 MiB pages from the huge page pool cannot be forked: use \"None\" or \"Transparent\""
    )]
    HugePagePool,
    /// The child is not connected with the server: pages that it has not sent yet would be zero.
    #[error("memory that a page server fills in cannot be forked: pages that it has not sent would be lost")]
    PageServer,
}

impl GuestRam {
    /// Whether the memory can be forked.
    pub fn fork_check(&self) -> Result<(), ForkError> {
        if self.huge_pages() == HugePages::Hugetlbfs2M {
            return Err(ForkError::HugePagePool);
        }
        match self.backing() {
            Backing::PageServer(_) => Err(ForkError::PageServer),
            Backing::Anonymous | Backing::File(_) => Ok(()),
        }
    }

    /// Notes that this process is about to be forked: from now on, on both sides, the file that the
    /// memory was restored from may have another user.
    pub fn note_fork(&self) {
        self.set_shared();
    }
}
