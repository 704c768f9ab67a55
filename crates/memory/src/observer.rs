//! Progress and cancellation of long operations on memory.

/// Receives the progress of a long operation and can cancel it. `()` does neither.
pub trait Observer: Sync {
    /// Reports that `done` of `total` bytes are complete. Called by the working thread every few
    /// MiB.
    fn progress(&self, done: u64, total: u64) {
        let _ = (done, total);
    }

    /// Whether to cancel the operation. It then leaves no file and returns an error such as
    /// [`ImageError::Cancelled`](crate::image::ImageError::Cancelled). Called every few MiB, and
    /// every few milliseconds while the operation waits.
    fn cancelled(&self) -> bool {
        false
    }
}

impl Observer for () {}
