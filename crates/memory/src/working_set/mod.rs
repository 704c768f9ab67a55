//! The pages that a guest needs first after a restore, and filling them in ahead of the guest.
//!
//! A restored guest starts with an empty page table: each page that it touches costs a fault, and
//! with a cold page cache a read from the disk. Most guests touch the same pages after every
//! restore. So the first restore is recorded ([`Recorder`]), the pages that it touched are stored
//! beside the snapshot ([`WorkingSet`]), and later restores fill them in ahead of the guest, in the
//! same order ([`Prefetch`]).
//!
//! A working set is advice. A wrong one costs time and memory, never correctness, because a page is
//! filled in with what it contains anyway. Nevertheless the working set of another image is
//! refused.
//!
//! # The file
//!
//! It has the format of state files ([`snapshot`]) with the kind `working-set`: checksummed,
//! versioned, and read in proportion to its size. A set never has more pages than the guest.

mod prefetch;
mod record;
mod set;

pub use prefetch::{Prefetch, PrefetchOptions, Prefetched};
pub use record::{RecordOptions, Recorder};
pub use set::{PageRun, WorkingSet, WorkingSetError};
