//! The mask and the pending bit of a vector, which a worker raises while the guest masks it.
//!
//! No interrupt is lost. A worker that finds the vector masked sets `pending` and then reads the
//! mask again. A vCPU that unmasks clears the mask and then takes `pending`. Each side has a full
//! fence between its two steps, so that in any order one sees the other. No interrupt is sent
//! twice: exactly one side takes `pending`.
//!
//! The code is generic over [`Flag`], so that a model checker can run it.

use std::sync::atomic::{AtomicBool, Ordering, fence};

/// An atomic boolean.
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

/// The mask and the pending bit of a vector. Masked at first.
#[derive(Debug, Default)]
pub(super) struct VectorMask<F> {
    unmasked: F,
    pending: F,
}

impl<F: Flag> VectorMask<F> {
    /// Raises the vector. Returns whether the message must be sent now.
    #[inline]
    pub(super) fn raise(&self) -> bool {
        if self.unmasked.get() {
            return true;
        }
        self.pending.set(true);
        F::full_fence();
        self.unmasked.get() && self.pending.take()
    }

    /// Unmasks the vector. Returns whether a message must be sent now.
    pub(super) fn unmask(&self) -> bool {
        self.unmasked.set(true);
        F::full_fence();
        self.pending.take()
    }

    /// Masks the vector. A message whose raising has begun may still be sent.
    pub(super) fn mask(&self) {
        self.unmasked.set(false);
    }

    /// Whether an interrupt is pending.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.get()
    }

    /// Sets the pending bit.
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
    fn interrupt_raised_during_an_unmask_is_sent_once() {
        loom::model(|| {
            let vector_mask = Arc::new(VectorMask::<loom::sync::atomic::AtomicBool>::default());
            let worker = {
                let vector_mask = Arc::clone(&vector_mask);
                loom::thread::spawn(move || u32::from(vector_mask.raise()))
            };
            let at_unmask = u32::from(vector_mask.unmask());
            assert_eq!(at_unmask + worker.join().unwrap(), 1);
            assert!(!vector_mask.is_pending());
        });
    }

    #[test]
    fn masked_interrupt_stays_pending() {
        loom::model(|| {
            let vector_mask = Arc::new(VectorMask::<loom::sync::atomic::AtomicBool>::default());
            vector_mask.unmask();
            let worker = {
                let vector_mask = Arc::clone(&vector_mask);
                loom::thread::spawn(move || u32::from(vector_mask.raise()))
            };
            vector_mask.mask();
            let later = u32::from(vector_mask.unmask());
            assert_eq!(later + worker.join().unwrap(), 1);
        });
    }
}
