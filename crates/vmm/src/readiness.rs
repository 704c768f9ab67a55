//! [`Readiness`]: tells a launcher when this process is ready, through a descriptor that it gave
//! (`--events-fd`).
//!
//! One byte is written for each of two moments: `A` when the API answers, and `R` when the guest
//! runs for the first time. After `R` the descriptor is closed, so a reader sees the end of the
//! file then, or without `R` when the process ends before the guest runs. Writes never wait, and a
//! reader that is gone is no error.
//!
//! Children of forks and writers of live snapshots do not have the descriptor.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use machine::legacy::Output;
use rustix::fs::{FileType, OFlags};

use crate::descriptors;
use crate::flags::ArgsError;

/// The API answers.
const API_ANSWERS: u8 = b'A';
/// The guest runs.
const GUEST_RUNS: u8 = b'R';

/// The kinds of file that `--events-fd` may be.
const KINDS: &str = "a pipe, FIFO, socket, terminal or file that is open for writing";

/// Tells a launcher when this process is ready. Does nothing if none asked for it.
#[derive(Debug, Default)]
pub(crate) struct Readiness {
    output: Option<Output>,
}

impl Readiness {
    /// Takes the descriptor `fd` of `--events-fd`, if there is one.
    ///
    /// Called before this process opens anything: a file that it opens would get the number of a
    /// descriptor that is not open.
    pub(crate) fn take(fd: Option<u32>) -> Result<Self, ArgsError> {
        let Some(number) = fd else { return Ok(Self::default()) };
        let refused = |reason: String| ArgsError::Value {
            name: "events-fd",
            value: number.to_string(),
            reason: format!("{reason}; it must be {KINDS}, with number 3 or more"),
        };
        let fd = RawFd::try_from(number).ok().filter(|fd| *fd > 2);
        let fd = fd.ok_or_else(|| refused("it cannot be used".to_owned()))?;
        let fd = descriptors::take(fd).map_err(|error| refused(format!("cannot use it: {error}")))?;
        check_kind(&fd).map_err(|found| refused(format!("it is {found}")))?;
        let output = Output::from_shared(fd.as_fd());
        // The duplicate that `output` has is the only one from here on.
        output.map(|output| Readiness { output: Some(output) }).map_err(|error| refused(error.to_string()))
    }

    /// The API answers from now on.
    pub(crate) fn api_answers(&self) {
        self.write(API_ANSWERS);
    }

    /// The guest runs. Only the first call has an effect.
    pub(crate) fn guest_runs(&mut self) {
        self.write(GUEST_RUNS);
        self.output = None;
    }

    fn write(&self, byte: u8) {
        let Some(output) = &self.output else { return };
        match output.write(&[byte]) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                log::debug!("the reader of --events-fd is gone");
            }
            Err(error) => log::warn!("--events-fd: cannot write {:?}: {error}", char::from(byte)),
            Ok(_) => {}
        }
    }
}

/// Checks that `fd` takes bytes. Returns what it is if it does not.
fn check_kind(fd: &OwnedFd) -> Result<(), &'static str> {
    let mode = rustix::fs::fcntl_getfl(fd).map_err(|_| "not open")? & OFlags::ACCMODE;
    let stat = rustix::fs::fstat(fd).map_err(|_| "not open")?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::RegularFile => {}
        FileType::Directory => return Err("a directory"),
        FileType::BlockDevice => return Err("a block device"),
        _ => return Err("an eventfd or the like"),
    }
    if mode == OFlags::RDONLY { Err("open only for reading") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};
    use std::os::fd::IntoRawFd;

    use super::*;

    /// Gives up `fd`, as a launcher that lets this process inherit it.
    fn given(fd: impl Into<OwnedFd>) -> Option<u32> {
        u32::try_from(fd.into().into_raw_fd()).ok()
    }

    #[test]
    fn bytes_are_written_once_and_the_descriptor_is_closed() {
        let (mut reader, writer) = pipe().unwrap();
        let mut readiness = Readiness::take(given(writer)).unwrap();
        readiness.api_answers();
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"A");
        readiness.guest_runs();
        readiness.guest_runs();
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "R");
    }

    #[test]
    fn reader_that_is_gone_or_stalls_is_no_error() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        Readiness::take(given(writer)).unwrap().guest_runs();
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(reader);
        Readiness::take(given(writer)).unwrap().guest_runs();
        let (_reader, writer) = pipe().unwrap();
        let full = Output::from_shared(writer.as_fd()).unwrap();
        while full.write(&[0; 4096]).is_ok() {}
        let mut readiness = Readiness::take(given(writer)).unwrap();
        readiness.api_answers();
        readiness.guest_runs();
    }

    #[test]
    fn descriptors_that_take_no_bytes_are_refused() {
        let refused = |fd| Readiness::take(fd).unwrap_err().to_string();
        assert!(refused(Some(2)).contains("--events-fd is \"2\": it cannot be used"));
        assert!(refused(Some(u32::MAX)).contains("it cannot be used"));
        assert!(refused(Some(1_000_000)).contains("Bad file descriptor"));
        for (fd, found) in [
            (given(sync::EventFd::new().unwrap()), "it is an eventfd"),
            (given(std::fs::File::open("/").unwrap()), "it is a directory"),
            (given(pipe().unwrap().0), "it is open only for reading"),
        ] {
            let error = refused(fd);
            assert!(error.contains(found) && error.contains("a pipe, FIFO, socket"), "{error}");
        }
        Readiness::take(None).unwrap().guest_runs();
    }
}
