//! An engine for fuzzing: an `io_uring` whose transfers are all complete when `submit` returns.
//!
//! Everything goes through the ring, also transfers that a worker would carry out itself. So the
//! results are deterministic, except that transfers submitted together may complete in any order.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use super::Engine;
use super::transfer::{Blocking, Done, Transfer};
use super::uring::{Uring, UringError};

/// A ring, and the transfers that it has completed.
#[derive(Debug)]
pub(crate) struct DrainingUring<T: Send> {
    ring: Box<Uring<T>>,
    done: Vec<Done<T>>,
}

impl<T: Send> DrainingUring<T> {
    /// An engine for `files`; the file of a transfer is an index into them.
    pub(crate) fn new(files: Vec<Arc<File>>) -> Result<Self, UringError> {
        let ring = Uring::new(files, Blocking::Never)?.with_all_in_ring();
        Ok(DrainingUring { ring: Box::new(ring), done: Vec::new() })
    }
}

impl<T: fmt::Debug + Send> Engine<T> for DrainingUring<T> {
    fn push(&mut self, transfer: Transfer<T>) {
        self.ring.push(transfer);
    }

    /// Carries out queued transfers, and waits for them.
    fn submit(&mut self) {
        self.ring.submit();
        self.ring.reap(&mut self.done);
        while self.ring.in_flight() > 0 {
            self.ring.wait();
            self.ring.submit();
            self.ring.reap(&mut self.done);
        }
    }

    fn reap(&mut self, done: &mut Vec<Done<T>>) {
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.ring.in_flight() + self.done.len()
    }
}
