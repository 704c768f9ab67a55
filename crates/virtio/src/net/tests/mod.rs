//! The device as its driver sees it.
