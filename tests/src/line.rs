//! Lines that several processes of a guest print to one console.

use std::io::Write;

/// Prints one line with one write, so that lines of several processes do not mix.
pub fn print_line(line: &str) {
    // Nothing can be done where the console is gone.
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}
