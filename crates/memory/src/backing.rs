//! Where pages come from that nobody has touched yet.

use std::fs::File;
use std::sync::Arc;

use crate::page_server::Connection;

/// What an untouched page of RAM is.
#[derive(Debug, Clone)]
pub(crate) enum Backing {
    /// Zeros.
    Anonymous,
    /// The bytes of a memory image, at the offsets of the layout.
    File(Arc<File>),
    /// What a page server sends.
    PageServer(Arc<Connection>),
}
