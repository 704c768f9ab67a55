//! Writing a Diff into its base through a redo log, so that the image is the old one or the new one
//! at any time.
//!
//! # Steps
//!
//! ```text
//! pages -> redo log beside the base    the base is unchanged: a kill leaves the old image
//! sync the log and the state file, rename the state file, which names the log's id
//! ------------------------------------ from here on the image is the base with the log
//! mark the base, check that it has no other user, write the pages to it, sync it,
//! remove the mark, remove the log
//! ```
//!
//! If the writer is killed, or the base cannot be written, the log remains. [`recover`] then writes
//! a new file with the log applied, because other processes may have the base open by then.
//!
//! # When a base is changed in place
//!
//! A base is changed in place only if no other process can see the change (`BaseCandidate`). It
//! must have one name, no other process may have it open or mapped ([`lease`](crate::sys::lease)),
//! and it must be on a local file system that keeps reserved space. A guest that was restored from
//! the base itself does not count as another user, unless its memory is shared with a fork. In all
//! other cases the base is copied, as [`write_diff`](super::write_diff) says.
//!
//! # One writer and its readers
//!
//! The writer and each reader (a restore, a merge, a copy for another image) first announce
//! themselves and then look for the other:
//!
//! ```text
//! writer                                      reader
//! W1 commit the log (locked) and the state    R1 open the base
//! W2 open the base                            R2 read the mark
//! W3 mark the base with the log's id          R3 no mark: use the file
//! W4 check that no other process has it open     mark and log: close the file, wait for the log or
//! W5 write and sync the base                        recover the image, start at R1
//! W6 remove the mark                             mark, no log: use the file if it still has its
//! W7 remove the log                                 name, else start at R1
//! ```
//!
//! A reader therefore never uses a file that changes, and never a half-written one:
//!
//! - R1 before W4, and the file still open at W4: the kernel counts the reader, so W4 fails. The
//!   writer removes the mark and recovers the image into a new file. The reader's file stays the
//!   old image, whether the reader read the mark before W3, after the mark was removed, or in
//!   between (then the reader closes it and opens the new one).
//! - R1 after W4: W3 came before, so R2 sees the mark until W6, and W5 was before W6. With a mark,
//!   the reader waits for the log's lock, which the writer holds until W7. Without one, the file is
//!   the complete new image, and the next writer counts the reader.
//! - R2 sees the mark, but R3 finds no log. Either the writer reached W7, so the file is complete.
//!   Or the writer was killed and another process recovered the image, which gives the name to a
//!   new file before it removes the log. R3 distinguishes the two by the name. So a mark that a
//!   crash or a copy left without a log is ignored, and the next writer replaces it.
//!
//! Two writers: a writer that finds a mark with a log at W2 leaves both alone and recovers its own
//! image as a reader of the other's. Two writers between W2 and W4 may overwrite or remove each
//! other's mark, but both have the base open. So W4 also checks that the mark is still its own and
//! the file still at its path: at that time no other process has the base open, and one that opens
//! it later sees the mark and does not change it.
//!
//! Kills: before W3, or with the mark removed after a failed W4, the base is the old image, and the
//! state names the log. From W3 to W6 the mark and the state name the log; the mark is on disk
//! before the first page. After W6 the base is complete, and applying the log again changes
//! nothing.
//!
//! Programs that ignore the mark are protected only by W4. A copy that another program starts
//! between W4 and W6 may contain half of a Diff.
//!
//! # Format
//!
//! `VESTREDO`, then records. A record starts with a header of three numbers, 8 bytes each,
//! little-endian: the offset and the length in the image (in bytes, both of whole pages), and a
//! kind. After the header of a `DATA` record follow its bytes. The last record is `END`. The log is
//! checked when it is read: no record may reach beyond the image.

mod base;
mod commit;
mod log;
mod mark;
mod reader;
#[cfg(test)]
mod tests;

pub(super) use base::open_base;
pub(super) use log::{LogWriter, RedoDiff};
pub(super) use reader::open_consistent;
pub use reader::recover;
