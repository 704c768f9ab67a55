//! [`LastLine`]: what the process keeps for its end by a panic or a fatal signal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};

use machine::legacy::Output;

use super::line::LineHead;
use super::recorder::Recorder;
use super::sink::Sink;

/// Writes the last line of a process that a panic or a fatal signal ends.
#[derive(Debug)]
pub struct LastLine {
    recorder: Arc<Mutex<Recorder>>,
    output: Output,
    pub(super) mid_line: Arc<AtomicBool>,
    /// The line, for which there is memory already.
    buffer: Vec<u8>,
    head: LineHead,
}

/// Memory for what a caller of [`LastLine::write_short`] adds to the head.
const SHORT_LINE: usize = 512;

impl LastLine {
    pub(super) fn new(
        recorder: &Arc<Mutex<Recorder>>,
        sink: &Sink,
        head: &LineHead,
    ) -> std::io::Result<Self> {
        let buffer = Vec::with_capacity(head.as_bytes().len() + SHORT_LINE);
        let head = head.clone();
        let recorder = Arc::clone(recorder);
        Ok(LastLine { recorder, output: sink.output()?, mid_line: sink.mid_line(), buffer, head })
    }

    /// Writes a line with all counters, unless another thread is writing one. Returns whether it
    /// was written. Not for a signal handler.
    pub fn write(&self) -> bool {
        let mut recorder = match self.recorder.try_lock() {
            Ok(recorder) => recorder,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        recorder.write().is_ok()
    }

    /// Writes a line of this time and these groups, which are JSON members without a comma at the
    /// end, at most 400 bytes. A signal handler may call it: it allocates nothing and takes no
    /// lock. A longer line, or one that the destination does not take, is lost.
    pub fn write_short(&mut self, time: &[u8], groups: &[u8]) {
        let LastLine { output, mid_line, buffer, head, .. } = self;
        buffer.clear();
        // A line that was written in part stays so, and is one bad line of its own.
        let end: &[u8] = if mid_line.load(Ordering::Acquire) { b"\n" } else { b"" };
        let parts = [end, b"{\"utc_timestamp_ms\":", time, b",", head.as_bytes(), groups, b"}\n"];
        if parts.iter().map(|part| part.len()).sum::<usize>() > buffer.capacity() {
            return;
        }
        for part in parts {
            buffer.extend_from_slice(part);
        }
        let _ = output.write(buffer);
    }
}
