//! [`Sink`]: writes whole lines to a file or FIFO without ever waiting for a reader.
//!
//! # Partial writes
//!
//! A pipe takes more than 4096 bytes only as far as they fit, and a line is longer. A full disk may
//! take a part too. The rest of such a line stays here and is written first the next time, so that
//! a line is complete before another one begins. While there is a rest, new lines are not taken:
//! the bytes held are at most one line.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use machine::legacy::Output;

/// A destination of lines.
#[derive(Debug)]
pub(crate) struct Sink {
    output: Output,
    /// The rest of a line that was written in part.
    rest: Vec<u8>,
    mid_line: Arc<AtomicBool>,
}

/// Why a line was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineError {
    /// The destination is full, because its reader does not read.
    #[error("it is full, and is not being read")]
    Full,
    /// The kernel refused the write.
    #[error(transparent)]
    Write(io::Error),
}

impl Sink {
    pub(crate) fn new(output: Output) -> Self {
        Sink { output, rest: Vec::new(), mid_line: Arc::default() }
    }

    /// Whether the destination ends within a line. Kept up to date, for writers that do not have
    /// the sink.
    pub(crate) fn mid_line(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.mid_line)
    }

    /// Another handle of the destination.
    pub(crate) fn output(&self) -> io::Result<Output> {
        self.output.try_clone()
    }

    /// Whether a part of a line is not written yet.
    pub(crate) fn has_rest(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Writes `line`, which ends with a line feed. If it is written in part, the rest follows
    /// later.
    pub(crate) fn write(&mut self, line: &[u8]) -> Result<(), LineError> {
        self.write_rest()?;
        let (written, result) = self.write_some(line);
        if written == 0 {
            return result;
        }
        self.set_rest(line[written..].to_vec());
        Ok(())
    }

    /// Writes what is left of the last line. An error if some of it is still left.
    pub(crate) fn write_rest(&mut self) -> Result<(), LineError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        let (written, result) = self.write_some(&self.rest);
        let left = self.rest.split_off(written);
        self.set_rest(left);
        result
    }

    fn set_rest(&mut self, rest: Vec<u8>) {
        self.mid_line.store(!rest.is_empty(), Ordering::Release);
        self.rest = rest;
    }

    /// Writes as much as the destination takes. Returns how much that was, and an error if it was
    /// not all.
    fn write_some(&self, bytes: &[u8]) -> (usize, Result<(), LineError>) {
        let mut written = 0;
        while written < bytes.len() {
            match self.output.write(&bytes[written..]) {
                Ok(0) => return (written, Err(LineError::Full)),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return (written, Err(LineError::Full));
                }
                Err(error) => return (written, Err(LineError::Write(error))),
            }
        }
        (written, Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::path::PathBuf;

    use rustix::fs::{CWD, Mode, OFlags, mkfifoat};

    use super::*;

    fn fifo() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mkfifoat(CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        (dir, path)
    }

    fn reader(path: &PathBuf) -> File {
        rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap().into()
    }

    /// Reads what is in the FIFO now.
    fn read(reader: &mut File, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        match reader.read(&mut bytes) {
            Ok(count) => bytes.truncate(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => bytes.clear(),
            Err(error) => panic!("{error}"),
        }
        bytes
    }

    /// A line of 10000 bytes that says which one it is.
    fn line(number: usize) -> Vec<u8> {
        format!("{number:09999}\n").into_bytes()
    }

    #[test]
    fn lines_stay_whole_when_a_pipe_takes_only_parts() {
        let (_dir, path) = fifo();
        let mut sink = Sink::new(Output::open(&path).unwrap());
        let mut reader = reader(&path);
        let (mut got, mut written) = (Vec::new(), Vec::new());
        // The reader takes odd amounts, less than is written: the pipe is full most of the time.
        for number in 0..200 {
            if sink.write(&line(number)).is_ok() {
                written.push(number);
            }
            got.extend(read(&mut reader, 7777));
        }
        while sink.write_rest().is_err() || !got.ends_with(b"\n") {
            got.extend(read(&mut reader, 7777));
        }
        loop {
            let more = read(&mut reader, 1 << 16);
            if more.is_empty() {
                break;
            }
            got.extend(more);
        }
        let expected: Vec<u8> = written.iter().flat_map(|number| line(*number)).collect();
        assert!(got == expected, "{} bytes differ from {} bytes", got.len(), expected.len());
        assert!(written.len() < 200, "some lines were lost");
        assert!(!sink.mid_line().load(Ordering::Acquire));
    }

    #[test]
    fn fifo_without_a_reader_never_blocks_and_holds_one_line() {
        let (_dir, path) = fifo();
        let mut sink = Sink::new(Output::open(&path).unwrap());
        let results: Vec<_> = (0..100).map(|number| sink.write(&line(number)).is_ok()).collect();
        // 65536 bytes fit: six lines and a part.
        assert_eq!(results.iter().filter(|written| **written).count(), 7);
        assert!(sink.has_rest() && sink.rest.len() < 10_000);
        assert!(sink.mid_line().load(Ordering::Acquire));
    }

    #[test]
    fn full_disk_loses_lines_and_leaves_no_part() {
        let mut sink = Sink::new(Output::open("/dev/full".as_ref()).unwrap());
        assert!(matches!(sink.write(&line(1)), Err(LineError::Write(_))));
        assert!(!sink.has_rest());
    }
}
