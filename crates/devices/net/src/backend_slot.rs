//! The slot that holds the backend of a queue pair while no task uses it.

use std::sync::{Arc, Mutex};

use crate::backend::Link;
use crate::backend::vhost::Vhost;
use crate::interceptor::FrameInterceptor;
use sync::locked;

/// Holds the backend of one queue pair between two drivers: the device or a detached task puts it
/// in, and the next task takes it out.
#[derive(Default)]
pub(crate) struct BackendSlot {
    parts: Mutex<BackendParts>,
}

/// The backend of one queue pair. A link that is gone for good is not put back.
#[derive(Default)]
pub(crate) struct BackendParts {
    pub(crate) link: Option<Link>,
    pub(crate) vhost: Option<Arc<Vhost>>,
    pub(crate) interceptor: Option<Box<dyn FrameInterceptor>>,
}

impl BackendSlot {
    pub(crate) fn new(parts: BackendParts) -> Self {
        BackendSlot { parts: Mutex::new(parts) }
    }

    pub(crate) fn take(&self) -> BackendParts {
        std::mem::take(&mut locked(&self.parts))
    }

    pub(crate) fn put(&self, parts: BackendParts) {
        *locked(&self.parts) = parts;
    }
}

impl std::fmt::Debug for BackendSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackendSlot").finish_non_exhaustive()
    }
}
