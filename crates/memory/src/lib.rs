//! Guest RAM: where it is in the guest's physical address space, and how it is mapped here.
//!
//! This is the only crate that maps guest memory. The others get a [`GuestRam`] (or the
//! [`GuestMemory`] in it) and access guest memory through `vm-memory`'s checked accessors. So an
//! invalid guest address is an error and never reaches memory outside the guest.
//!
//! # Modules
//!
//! - [`layout`]: where RAM is in the guest and in an image.
//! - [`GuestRam`]: mapped RAM. It is new ([`GuestRam::map`]), from an image
//!   ([`GuestRam::from_file`]) or from a page server ([`GuestRam::from_page_server`]).
//! - [`pages`]: sets of pages. [`GuestRam::changed_pages`] finds those in use,
//!   [`GuestRam::take_dirty_pages`] those that were written.
//! - [`iovec`]: guest buffers as lists of `struct iovec`.
//! - [`image`]: images on disk: full, partial and merged.
//! - [`page_server`]: memory that another process fills in, and what happens if that process dies.
//! - [`working_set`]: the pages that a guest needs first: recorded, stored, filled in.
//!
//! # Invariants
//!
//! - RAM is *private* memory: anonymous, or a private mapping of a file. It is shared with another
//!   process only copy-on-write. Forks and clones depend on this.
//! - Every region starts at a host address aligned to 2 MiB, as its guest address is. So huge pages
//!   can back it on both sides.
//! - Mapping RAM neither reserves nor touches it, except for pages of the hugetlb pool. A guest of
//!   1 TiB costs page tables for what it touches. Finding the pages in use touches none either.
//! - RAM never overlaps the holes that [`layout`] leaves for devices.
//! - Addresses of RAM stay mapped as long as the process lives. After its machine is gone they read
//!   as zeros.
//!
//! # Errors
//!
//! Mapping fails with [`MapError`], which has the size, the kind of pages and the kernel's reason.
//! Files and page servers have error types of their own. A `GuestRam` that was built does not fail.
//! Single accesses do, with `vm-memory`'s error, which devices treat as the guest's fault.
//!
//! # Unsafe code
//!
//! It is in the leaf modules of `sys` and in [`iovec`].
//!
//! # Callers
//!
//! `machine` maps the RAM of new guests and registers all RAM with KVM. `control` restores RAM from
//! snapshots and writes its images. The devices read and write guest memory through it.

#![deny(unsafe_code)]

mod backing;
mod dirty;
mod discard;
mod fork;
pub mod image;
pub mod iovec;
pub mod layout;
mod observer;
pub mod page_server;
pub mod pages;
mod ram;
mod resident;
mod server_link;
mod sys;
pub mod working_set;

pub use dirty::TakeDirtyError;
pub use discard::DiscardError;
pub use fork::ForkError;
pub use layout::{ImageRegion, LayoutError, MemoryLayout};
pub use pages::{PageSet, PageSetError};
pub use ram::{GuestMemory, GuestRam, GuestRegion, MapError, RamRegion};
