//! What backs pages of guest RAM that were not touched yet.

use std::fs::File;
use std::sync::Arc;

use crate::server_link::ServerLink;

/// Where the contents of an untouched page come from.
#[derive(Debug, Clone)]
pub(crate) enum Backing {
    /// Anonymous memory: the page is zero.
    Anonymous,
    /// A memory image, mapped privately, at the offsets of the layout.
    File(Arc<File>),
    /// A page server, which answers the page fault.
    PageServer(Arc<ServerLink>),
}
