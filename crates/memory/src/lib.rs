//! Guest RAM: where it lies in the guest's physical address space, and how it is mapped here.
//!
//! This is the only room that maps guest memory. Everyone else gets a [`GuestRam`] (or the [`GuestMemory`] in it)
//! and reaches guest memory through `vm-memory`'s checked accessors, so an address that a guest made up can fail
//! but cannot leave the guest.
//!
//! # Invariants
//!
//! - RAM is *private* memory: anonymous, never shared with another process except copy-on-write. Fork and clones rest
//!   on this.
//! - Every region begins at a host address aligned to 2 MiB, as its guest address is, so that huge pages can back it
//!   and line up on both sides.
//! - Nothing is reserved or touched at start: a guest of 1 TiB costs page tables for what it touches, no more.
//! - RAM never overlaps the holes that [`layout`] leaves for devices.
//!
//! # Errors
//!
//! Mapping fails with [`MapError`], which names the size, the kind of page and the kernel's reason. Once built, a
//! `GuestRam` does not fail; single accesses do, with `vm-memory`'s error, and callers that serve a guest treat
//! that as the guest's fault.
//!
//! # Callers
//!
//! `machine` builds it and registers it with KVM; `virtio` reads and writes through it.

mod dirty;
mod fork;
pub mod image;
pub mod layout;
pub mod page_server;
pub mod pages;
mod ram;
mod resident;
mod source;
mod sys;
pub mod working_set;

pub use fork::ForkError;
pub use layout::{ImageRegion, LayoutError, MemoryLayout};
pub use pages::{PageSet, PageSetError};
pub use ram::{DiscardError, GuestRam, MapError, RamRegion};

/// The guest's memory as `vm-memory` sees it: regions that never change while a machine lives, each with an optional
/// bitmap of the pages that the *monitor* wrote (KVM keeps the log of what the guest wrote).
pub type GuestMemory = vm_memory::GuestMemoryMmap<Option<vm_memory::bitmap::AtomicBitmap>>;

/// One region of [`GuestMemory`].
pub type GuestRegion = vm_memory::GuestRegionMmap<Option<vm_memory::bitmap::AtomicBitmap>>;
