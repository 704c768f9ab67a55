//! Copying ranges from file to file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::error::ImageError;
use super::file::{CHUNK, ImageTarget};

/// Copies `range` of `from` to the same offset of `target`, within the kernel if possible. Calls
/// `stepped` with the number of bytes copied so far.
pub(super) fn copy(
    from: &File,
    target: &ImageTarget<'_>,
    range: Range<u64>,
    mut stepped: impl FnMut(u64) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let mut at = range.start;
    let mut by_kernel = true;
    let mut buffer = Vec::new();
    while at < range.end {
        let len = (range.end - at).min(CHUNK) as usize;
        let (mut source, mut sink) = (at, at);
        let copied = if by_kernel {
            match rustix::fs::copy_file_range(from, Some(&mut source), target.file, Some(&mut sink), len) {
                // The files are on two file systems, or the file system does not support it.
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                    by_kernel = false;
                    continue;
                }
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => Ok(n),
                Err(Errno::INTR) => continue,
                Err(e) => Err(e.into()),
            }
        } else {
            buffer.resize(len, 0);
            from.read_exact_at(&mut buffer, at)
                .and_then(|()| target.file.write_all_at(&buffer, at))
                .map(|()| len)
        };
        at += copied.map_err(|e| target.error(at, e))? as u64;
        stepped(at - range.start)?;
    }
    Ok(())
}
