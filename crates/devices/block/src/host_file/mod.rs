//! Files of disks on the host: locks, failed syncs, and the durability of their names.

pub(crate) mod health;
pub(crate) mod lock;
pub(crate) mod name;

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// Whether both are of one file: the same inode of the same file system.
pub(crate) fn is_same_inode(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}
