//! What guests said, where it was not read as it came: in files that serial ports lead to.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// How often a file is looked at: nobody tells that something was written to it.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Waits until the file has `text` in it; all that it has then.
pub fn wait_for_text(file: &Path, text: &str, patience: Duration) -> Result<String> {
    wait_for_text_after(file, 0, text, patience)
}

/// The same, looking only at what comes after the first `from` bytes.
pub fn wait_for_text_after(file: &Path, from: usize, text: &str, patience: Duration) -> Result<String> {
    let deadline = Instant::now() + patience;
    loop {
        let output = fs::read_to_string(file).unwrap_or_default();
        if output.get(from..).is_some_and(|output| output.contains(text)) {
            return Ok(output);
        }
        ensure!(Instant::now() < deadline, "{} does not say {text}; it says:\n{output}", file.display());
        std::thread::sleep(LOOK_EVERY);
    }
}

/// What follows `mark` on its line.
pub fn word<'a>(output: &'a str, mark: &str) -> Result<&'a str> {
    let rest = output.lines().find_map(|line| line.split(mark).nth(1));
    Ok(rest.with_context(|| format!("no {mark} in:\n{output}"))?.trim())
}
