//! Files that appear under their name whole, or not at all.
//!
//! An [`AtomicFile`] has no name while it is written (`O_TMPFILE`), so a killed writer leaves
//! nothing behind. A complete file ([`AtomicFile::stage`]) is synced, linked under a temporary name
//! beside the final one, `NAME.ID.vesta-tmp`, and then renamed ([`Staged::commit`]). The rename
//! replaces an older file in one step. As the sync comes first, a writer that hangs or is killed in
//! it has no name yet.
//!
//! Without `O_TMPFILE` or `/proc` the file has its temporary name from the start, and dropping the
//! value removes it. A killed writer leaves such a name behind; the next commit of the same final
//! name removes it. A file is locked (`flock`) while its writer lives, so files of living writers
//! stay.
//!
//! # Changes in place
//!
//! A few changes to a large file need not be a new file. They are first written to a redo log
//! beside it, `NAME.ID.vesta-redo` ([`AtomicFile::create_redo`]). [`commit_redo`] makes the log and
//! the state file that names its id appear as one step. From then on the file's contents are the
//! file with the log applied. The owner of the log's lock may then write the changes to the file,
//! as often as needed, and remove the log ([`RedoLog`]).
//!
//! # Targets
//!
//! [`AtomicFile::create`] refuses a path that no rename can replace, before anything is written: a
//! mount point (a bind mount in a jail), a file that is immutable, append-only or protected by a
//! sticky directory, a dangling symbolic link, and anything but a regular file. Such a file is
//! never written in place: a host crash would leave it half old, and a guest that maps it would see
//! the change.
//!
//! A snapshot is two files, and no file system renames two in one step. So [`commit_pair`] makes
//! the rename of the state file the commit point: the memory file is staged under a name that holds
//! its [`FileId`], and the state file names that id. If the host fails between the two renames,
//! [`find`] still finds the memory file that belongs to the state.

mod atomic;
mod commit;
mod destination;
mod id;
mod lookup;
mod redo_log;

pub use atomic::{AtomicFile, Staged};
pub use commit::{commit_pair, commit_redo};
pub use destination::FileError;
pub use id::FileId;
pub use lookup::{find, is_same_path, redo_path};
pub use redo_log::RedoLog;

#[cfg(test)]
mod tests;
