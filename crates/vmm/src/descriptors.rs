//! The limit of open descriptors of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Enough for all connections of a vsock device and everything else.
const ENOUGH: u64 = 8192;

/// Raises the soft limit to [`ENOUGH`], or to the hard limit if that is lower. The usual 1024
/// exists for programs that use `select(2)`.
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
