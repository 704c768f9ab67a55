//! The leaf modules of this room that talk to the kernel with raw addresses. All unsafe code of the room is in here, each block
//! about one call; what they export is safe to call with any mapped [`Span`](span::Span).

pub(crate) mod lease;
pub(crate) mod pagemap;
pub(crate) mod peer;
pub(crate) mod span;
pub(crate) mod span_io;
pub(crate) mod userfault;
