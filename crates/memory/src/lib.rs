//! Guest RAM: where it lies in the guest's physical address space, and how it is mapped here.
//!
//! This is the only room that maps guest memory. Everyone else gets a [`GuestRam`] (or the [`GuestMemory`] in it)
//! and reaches guest memory through `vm-memory`'s checked accessors, so an address that a guest made up can fail
//! but cannot leave the guest.
//!
//! # What is where
//!
//! | module | what |
//! |---|---|
//! | [`layout`] | where RAM is in the guest, and in an image |
//! | [`GuestRam`] | RAM that is mapped: new ([`GuestRam::map`]), from an image ([`GuestRam::from_file`]), from a page server ([`GuestRam::from_page_server`]) |
//! | [`pages`] | sets of pages: [`GuestRam::changed_pages`] finds those in use, [`GuestRam::take_dirty_pages`] those that were written |
//! | [`image`] | images on disk: written, full or in part, and merged |
//! | [`page_server`] | another process that fills memory in, and what if it dies |
//! | [`working_set`] | what a guest needs first: recorded, kept, filled in |
//!
//! # Invariants
//!
//! - RAM is *private* memory: anonymous or a private view of a file, never shared with another process except copy-on-write.
//!   Fork and clones rest on this.
//! - Every region begins at a host address aligned to 2 MiB, as its guest address is, so that huge pages can back it
//!   and line up on both sides.
//! - Nothing is reserved or touched at start: a guest of 1 TiB costs page tables for what it touches, no more. Neither does
//!   looking which pages there are touch any.
//! - RAM never overlaps the holes that [`layout`] leaves for devices.
//! - Mappings live as long as the process: addresses of a machine that is gone read as zeros.
//!
//! # Errors
//!
//! Mapping fails with [`MapError`], which names the size, the kind of page and the kernel's reason; what has to do with files or
//! servers has errors of its own that name these. Once built, a `GuestRam` does not fail; single accesses do, with
//! `vm-memory`'s error, and callers that serve a guest treat that as the guest's fault.
//!
//! # Callers
//!
//! `machine` builds it, registers it with KVM, and has its images written; `virtio` reads and writes through it.

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
