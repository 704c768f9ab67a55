//! Spent lists of guest buffers, kept for their allocations.

use memory::iovec::GuestIoVec;

/// Lists of guest buffers to use again.
#[derive(Debug, Default)]
pub(crate) struct BufferPool(Vec<GuestIoVec>);

impl BufferPool {
    /// Most lists that are kept.
    const MAX: usize = 64;

    /// An empty list: a recycled one, if there is any.
    pub(crate) fn take(&mut self) -> GuestIoVec {
        self.0.pop().unwrap_or_default()
    }

    /// Takes back a list that is not needed any more.
    pub(crate) fn recycle(&mut self, mut buffers: GuestIoVec) {
        if self.0.len() < Self::MAX {
            buffers.clear();
            self.0.push(buffers);
        }
    }
}
