//! Bounds of requests.

/// Longest request line and headers together, in bytes.
pub(crate) const MAX_HEAD: usize = 4096;
/// Most headers of one request.
pub(crate) const MAX_HEADERS: usize = 64;
/// Longest body that is skipped, in bytes.
pub(crate) const MAX_BODY: u64 = 64 << 10;
