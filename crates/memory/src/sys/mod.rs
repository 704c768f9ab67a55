//! Leaf modules with the system calls that take raw addresses. Each unsafe block is one call. What
//! they export is safe to call with any [`Span`](span::Span), which is mapped guest RAM.
#![expect(unsafe_code, reason = "the system calls take raw addresses and descriptors")]

pub(crate) mod lease;
pub(crate) mod pagemap;
pub(crate) mod peer;
pub(crate) mod span;
pub(crate) mod span_io;
pub(crate) mod userfault;
