//! A vector between the worker that raises it and the guest that masks it.
//!
//! No interrupt is lost: a worker that finds the vector_mask closed says that one is pending and then looks again; who opens it
//! opens it first and then takes what is pending. Between the two steps on either side stands a full fence, so in any order one of
//! them sees the other. And none is sent twice: `pending` is taken by exactly one of them.
//!
//! Written over [`Flag`], so that a model checker can run this very code.

use std::sync::atomic::{AtomicBool, Ordering, fence};

/// A boolean that threads share.
pub(super) trait Flag: Default {
    /// With acquire order.
    fn get(&self) -> bool;
    /// With release order.
    fn set(&self, value: bool);
    /// Sets it to false, with acquire and release order. Returns what it was.
    fn take(&self) -> bool;
    /// Orders all accesses before it before all accesses after it.
    fn full_fence();
}

impl Flag for AtomicBool {
    fn get(&self) -> bool {
        self.load(Ordering::Acquire)
    }

    fn set(&self, value: bool) {
        self.store(value, Ordering::Release);
    }

    fn take(&self) -> bool {
        self.compare_exchange(true, false, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

/// Whether a vector may be sent, and whether it is owed. Closed at first.
#[derive(Debug, Default)]
pub(super) struct VectorMask<F> {
    open: F,
    pending: F,
}

impl<F: Flag> VectorMask<F> {
    /// Something happened. True if the message is to be sent now.
    #[inline]
    pub(super) fn raise(&self) -> bool {
        if self.open.get() {
            return true;
        }
        self.pending.set(true);
        F::full_fence();
        self.open.get() && self.pending.take()
    }

    /// Messages may be sent from now on. True if one is to be sent now.
    pub(super) fn open(&self) -> bool {
        self.open.set(true);
        F::full_fence();
        self.pending.take()
    }

    /// Messages are kept from now on. (One whose raising has begun may still be sent.)
    pub(super) fn close(&self) {
        self.open.set(false);
    }

    /// Whether one is kept.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.get()
    }

    /// Says whether one is kept.
    pub(super) fn set_pending(&self, pending: bool) {
        self.pending.set(pending);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    impl Flag for loom::sync::atomic::AtomicBool {
        fn get(&self) -> bool {
            self.load(Ordering::Acquire)
        }

        fn set(&self, value: bool) {
            self.store(value, Ordering::Release);
        }

        fn take(&self) -> bool {
            self.compare_exchange(true, false, Ordering::AcqRel, Ordering::Acquire).is_ok()
        }

        fn full_fence() {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    #[test]
    fn in_every_order_an_interrupt_that_is_raised_while_the_guest_unmasks_is_sent_once() {
        loom::model(|| {
            let vector_mask = Arc::new(VectorMask::<loom::sync::atomic::AtomicBool>::default());
            let worker = {
                let vector_mask = Arc::clone(&vector_mask);
                loom::thread::spawn(move || u32::from(vector_mask.raise()))
            };
            let opened = u32::from(vector_mask.open());
            assert_eq!(opened + worker.join().unwrap(), 1);
            assert!(!vector_mask.is_pending());
        });
    }

    #[test]
    fn in_every_order_masking_keeps_what_is_not_sent() {
        loom::model(|| {
            let vector_mask = Arc::new(VectorMask::<loom::sync::atomic::AtomicBool>::default());
            vector_mask.open();
            let worker = {
                let vector_mask = Arc::clone(&vector_mask);
                loom::thread::spawn(move || u32::from(vector_mask.raise()))
            };
            vector_mask.close();
            let later = u32::from(vector_mask.open());
            assert_eq!(later + worker.join().unwrap(), 1);
        });
    }
}
