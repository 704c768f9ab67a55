//! Output of guests whose serial port goes to a file.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The interval of polling a file.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Waits until the file contains `text`. Returns its content.
pub fn wait_for_text(file: &Path, text: &str, timeout: Duration) -> Result<String> {
    wait_for_text_after(file, 0, text, timeout)
}

/// The same, without the first `from` bytes.
pub fn wait_for_text_after(file: &Path, from: usize, text: &str, timeout: Duration) -> Result<String> {
    let deadline = Instant::now() + timeout;
    loop {
        let output = fs::read_to_string(file).unwrap_or_default();
        if output.get(from..).is_some_and(|output| output.contains(text)) {
            return Ok(output);
        }
        ensure!(Instant::now() < deadline, "{}: no {text} in:\n{output}", file.display());
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The text after `mark` on its line.
pub fn word<'a>(output: &'a str, mark: &str) -> Result<&'a str> {
    let rest = output.lines().find_map(|line| line.split(mark).nth(1));
    Ok(rest.with_context(|| format!("no {mark} in:\n{output}"))?.trim())
}
