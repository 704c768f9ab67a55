//! Where a back end waits between two drivers: put there by the device or by a task that ends, taken by the next.

use std::sync::{Arc, Mutex};

use super::backend::Link;
use super::interceptor::FrameInterceptor;
use super::vhost::Vhost;
use sync::locked;

/// What one pair of queues works with.
#[derive(Default)]
pub(super) struct Port {
    inner: Mutex<Parts>,
}

/// The parts of a port. A link that is gone for good is not put back.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) link: Option<Link>,
    pub(super) vhost: Option<Arc<Vhost>>,
    pub(super) interceptor: Option<Box<dyn FrameInterceptor>>,
}

impl Port {
    pub(super) fn new(parts: Parts) -> Self {
        Port { inner: Mutex::new(parts) }
    }

    pub(super) fn take(&self) -> Parts {
        std::mem::take(&mut locked(&self.inner))
    }

    pub(super) fn put(&self, parts: Parts) {
        *locked(&self.inner) = parts;
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").finish_non_exhaustive()
    }
}
