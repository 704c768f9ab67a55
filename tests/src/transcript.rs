//! The output of a process, recorded with the time of each line.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// One output stream of a process, which a thread reads until it closes.
#[derive(Debug, Clone)]
pub struct Transcript {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// The length of `bytes` after each chunk, and its time of arrival.
    arrivals: Vec<(usize, Instant)>,
    closed: bool,
}

/// A line with its time of arrival.
#[derive(Debug, Clone)]
pub struct Line {
    /// When its last byte was read.
    pub at: Instant,
    /// Its text, without the line break.
    pub text: String,
}

impl Transcript {
    /// Records `stream`. With a `label`, prints each line on standard error, after the label.
    pub fn of(mut stream: impl Read + Send + 'static, label: Option<&'static str>) -> Transcript {
        let transcript = Transcript { shared: Arc::default() };
        let writer = transcript.clone();
        std::thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            let mut shown = 0;
            while let Ok(len @ 1..) = stream.read(&mut chunk) {
                writer.push(&chunk[..len]);
                if let Some(label) = label {
                    shown = writer.show(label, shown, false);
                }
            }
            if let Some(label) = label {
                writer.show(label, shown, true);
            }
            writer.lock().closed = true;
            writer.shared.1.notify_all();
        });
        transcript
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.bytes.extend_from_slice(bytes);
        let len = state.bytes.len();
        state.arrivals.push((len, Instant::now()));
        self.shared.1.notify_all();
    }

    /// Prints the complete lines after `from`; returns their end.
    fn show(&self, label: &str, from: usize, last: bool) -> usize {
        let text = self.lock().bytes[from..].to_vec();
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let end = if last { text.len() } else { whole };
        for line in String::from_utf8_lossy(&text[..end]).lines() {
            eprintln!("{label} | {}", line.trim_end());
        }
        from + end
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().expect("no thread panics with it")
    }

    /// The output so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// The number of bytes so far.
    pub fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// Whether there is no output so far.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The complete lines so far.
    pub fn lines(&self) -> Vec<Line> {
        self.lock().lines(0)
    }

    /// Waits for a complete line that contains `text`, and returns the first.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<Line> {
        self.wait_for_after(0, text, timeout)
    }

    /// The same, for lines that begin at byte `from` or later.
    pub fn wait_for_after(&self, from: usize, text: &str, timeout: Duration) -> Result<Line> {
        self.wait(&format!("{text:?}"), timeout, |state| {
            state.lines(from).into_iter().find(|line| line.text.contains(text))
        })
    }

    /// Waits for more than `len` bytes in all.
    pub fn wait_for_more_than(&self, len: usize, timeout: Duration) -> Result<()> {
        self.wait("more output", timeout, |state| (state.bytes.len() > len).then_some(()))
    }

    /// Waits until the stream is closed, and returns all output.
    pub fn wait_for_end(&self, timeout: Duration) -> Result<String> {
        self.wait("the end of the output", timeout, |state| {
            state.closed.then(|| String::from_utf8_lossy(&state.bytes).into_owned())
        })
    }

    fn wait<T>(&self, what: &str, timeout: Duration, find: impl Fn(&State) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(found) = find(&state) {
                return Ok(found);
            }
            let so_far = || String::from_utf8_lossy(&state.bytes).into_owned();
            if state.closed {
                bail!("output ended without {what}; output:\n{}", so_far());
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                bail!("no {what} within {timeout:?}; output so far:\n{}", so_far());
            };
            state = self.shared.1.wait_timeout(state, left).expect("no thread panics with it").0;
        }
    }
}

impl State {
    /// The complete lines that begin at byte `from` or later. A line ends with a line break or the
    /// stream. The monitor's log may be in the middle of a line of the guest: the log's line comes
    /// first then.
    fn lines(&self, from: usize) -> Vec<Line> {
        let mut lines = Vec::new();
        // The beginning of a line that the log has interrupted, and where it is.
        let mut begun: Option<(usize, Vec<u8>)> = None;
        let mut start = 0;
        while let Some(rest) = self.bytes.get(start..).filter(|rest| !rest.is_empty()) {
            let end = match rest.iter().position(|&byte| byte == b'\n') {
                Some(len) => start + len + 1,
                None if self.closed => self.bytes.len(),
                None => break,
            };
            let (mut at, mut text) = begun.take().unwrap_or((start, Vec::new()));
            let piece = &self.bytes[start..end];
            match log_line_in(piece) {
                Some(cut) if cut > 0 || !text.is_empty() => {
                    text.extend_from_slice(&piece[..cut]);
                    begun = Some((at, text));
                    (at, text) = (start + cut, piece[cut..].to_vec());
                }
                _ => text.extend_from_slice(piece),
            }
            if at >= from {
                let text = String::from_utf8_lossy(&text).trim_end_matches(['\r', '\n']).to_owned();
                lines.push(Line { at: self.arrival(end), text });
            }
            start = end;
        }
        if let (Some((at, text)), true) = (begun, self.closed)
            && at >= from
        {
            let text = String::from_utf8_lossy(&text).into_owned();
            lines.push(Line { at: self.arrival(self.bytes.len()), text });
        }
        lines
    }

    /// The time at which the first `len` bytes had arrived.
    fn arrival(&self, len: usize) -> Instant {
        let index = self.arrivals.partition_point(|(reached, _)| *reached < len);
        self.arrivals[index].1
    }
}

/// Where a line of the monitor's log begins in these bytes: `2026-01-01T00:00:00.000000005 [`.
fn log_line_in(bytes: &[u8]) -> Option<usize> {
    const FORM: &[u8] = b"0000-00-00T00:00:00.000000000 [";
    let fits = |(byte, form): (&u8, &u8)| if *form == b'0' { byte.is_ascii_digit() } else { byte == form };
    bytes.windows(FORM.len()).position(|window| window.iter().zip(FORM).all(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn transcript() -> (std::io::PipeWriter, Transcript) {
        let (reader, writer) = std::io::pipe().unwrap();
        (writer, Transcript::of(reader, None))
    }

    #[test]
    fn a_line_is_found_when_it_is_complete() {
        use std::io::Write;
        let (mut writer, transcript) = transcript();
        writer.write_all(b"one\r\nhello wor").unwrap();
        assert_eq!(transcript.wait_for("one", LONG).unwrap().text, "one");
        assert!(transcript.wait_for("hello", Duration::from_millis(20)).is_err());
        writer.write_all(b"ld\r\n").unwrap();
        assert_eq!(transcript.wait_for("hello", LONG).unwrap().text, "hello world");
    }

    #[test]
    fn lines_before_the_start_are_skipped() {
        use std::io::Write;
        let (mut writer, transcript) = transcript();
        writer.write_all(b"tick 1\n").unwrap();
        transcript.wait_for("tick", LONG).unwrap();
        let mark = transcript.len();
        writer.write_all(b"tick 2\n").unwrap();
        assert_eq!(transcript.wait_for_after(mark, "tick", LONG).unwrap().text, "tick 2");
    }

    #[test]
    fn a_line_that_the_log_interrupts_is_whole() {
        use std::io::Write;
        let (mut writer, transcript) = transcript();
        let [one, two] = [1, 2].map(|n| format!("2026-01-01T00:00:00.00000000{n} [vm:main] log {n}"));
        write!(writer, "{one}\ntick{two}\n{one}\n 7\r\nre{two}\nst").unwrap();
        drop(writer);
        transcript.wait_for_end(LONG).unwrap();
        let texts: Vec<_> = transcript.lines().into_iter().map(|line| line.text).collect();
        assert_eq!(texts, [&one, &two, &one, "tick 7", &two, "rest"]);
    }

    #[test]
    fn the_end_of_the_stream_ends_the_last_line() {
        use std::io::Write;
        let (mut writer, transcript) = transcript();
        writer.write_all(b"all there was").unwrap();
        drop(writer);
        assert_eq!(transcript.wait_for("all", LONG).unwrap().text, "all there was");
        let error = transcript.wait_for("more", LONG).unwrap_err().to_string();
        assert!(error.contains("all there was"), "{error}");
    }

    #[test]
    fn a_line_has_the_time_of_its_last_byte() {
        use std::io::Write;
        let (mut writer, transcript) = transcript();
        writer.write_all(b"first\n").unwrap();
        let first = transcript.wait_for("first", LONG).unwrap();
        let between = Instant::now();
        writer.write_all(b"second\n").unwrap();
        let second = transcript.wait_for("second", LONG).unwrap();
        assert!(first.at <= between && between <= second.at);
    }
}
