//! An engine for fuzzing: a real `io_uring`, whose transfers are over when `submit` returns.
//!
//! Everything goes through the ring, also what a worker would otherwise carry out itself. So what happens follows from what is asked, but for one
//! thing: transfers that were submitted together may end in any order.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use super::Engine;
use super::transfer::{Blocking, Done, Transfer};
use super::uring::{Uring, UringError};

/// A ring, and what of it is over.
#[derive(Debug)]
pub(crate) struct DrainingUring<T: Send> {
    ring: Box<Uring<T>>,
    done: Vec<Done<T>>,
}

impl<T: Send> DrainingUring<T> {
    /// An engine for `files`; a transfer's file is an index into them.
    pub(crate) fn new(files: Vec<Arc<File>>) -> Result<Self, UringError> {
        let ring = Uring::new(files, Blocking::Never)?.with_all_in_ring();
        Ok(DrainingUring { ring: Box::new(ring), done: Vec::new() })
    }
}

impl<T: fmt::Debug + Send> Engine<T> for DrainingUring<T> {
    fn push(&mut self, transfer: Transfer<T>) {
        self.ring.push(transfer);
    }

    /// Carries out what was noted, and waits for it.
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
