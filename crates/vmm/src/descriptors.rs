//! How many descriptors this process may have.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Enough for all connections of a vsock device and everything else.
const ENOUGH: u64 = 8192;

/// Raises the limit to what the process may take by itself, as far as it needs: the usual 1024 is there for programs that use
/// `select(2)`.
pub(crate) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX).min(ENOUGH);
    if limit.current.is_some_and(|current| current < most) {
        let raised = Rlimit { current: Some(most), ..limit };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            log::warn!("the limit of open descriptors stays at {:?}: {error}", limit.current);
        }
    }
}
