//! Copying guest memory to and from files, and checking pages for zeros. The kernel copies, so no
//! Rust reference into guest memory exists.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::pages::PAGE;
use crate::sys::span::Span;

/// Writes all of `span` to `file` at `offset`. After an error the file may hold a part of it.
pub(crate) fn write_all(file: &File, span: Span, offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < span.len() {
        let rest = span.subspan(done..span.len());
        // SAFETY: `rest` is mapped (type invariant of `Span`); the kernel only reads it.
        let n = unsafe {
            libc::pwrite(
                file.as_raw_fd(),
                rest.as_ptr().cast(),
                rest.len() as usize,
                (offset + done).cast_signed(),
            )
        };
        done += progressed(n, io::ErrorKind::WriteZero)?;
    }
    Ok(())
}

/// Fills all of `span` from `file` at `offset`.
pub(crate) fn read_exact(file: &File, span: Span, offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < span.len() {
        let rest = span.subspan(done..span.len());
        // SAFETY: `rest` is mapped guest memory (type invariant of `Span`), into which no reference
        // exists.
        let n = unsafe {
            libc::pread(
                file.as_raw_fd(),
                rest.as_ptr().cast(),
                rest.len() as usize,
                (offset + done).cast_signed(),
            )
        };
        done += progressed(n, io::ErrorKind::UnexpectedEof)?;
    }
    Ok(())
}

/// The bytes that a read or write moved. `end` is the error for none. An interrupted call moved 0
/// and is to be repeated.
fn progressed(n: isize, end: io::ErrorKind) -> io::Result<u64> {
    match u64::try_from(n) {
        Ok(0) => Err(end.into()),
        Ok(n) => Ok(n),
        Err(_) => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            e => Err(e),
        },
    }
}

/// Whether the page at `offset` in `span` is all zeros. Faults the page in.
pub(crate) fn is_zero(span: Span, offset: u64) -> bool {
    let page = span.subspan(offset..offset + PAGE);
    let start = page.addr() as usize;
    // One cache line at a time: most pages that are not zero differ in the first one.
    (0..PAGE as usize / 64).all(|line| {
        let mut all = 0;
        for word in 0..8 {
            let word = (start + line * 64 + word * 8) as *mut u64;
            // SAFETY: the address is within the page, which is mapped (`Span`) and aligned. Guests
            // and monitor threads write it only through raw pointers and atomics.
            let word = unsafe { AtomicU64::from_ptr(word) };
            all |= word.load(Ordering::Relaxed);
        }
        all == 0
    })
}

/// Reads the first byte, which faults its page in.
pub(crate) fn touch(span: Span) -> u8 {
    assert!(span.len() > 0, "an empty span has no byte");
    // SAFETY: the span is mapped (`Span`) and not empty. A volatile read of a byte takes any value.
    unsafe { std::ptr::read_volatile(span.as_ptr()) }
}
