//! [`end_of`]: how a tool ends, the same for all of them.

use std::fmt::Display;
use std::io;

use crate::crash_report;
use crate::exit::ExitCode;

/// The exit code of a tool. Its error, if there is one, goes to standard error.
///
/// `output_error` returns the error of a write to standard output, if it is one: a reader that has
/// closed the pipe needs no more, so that is no error.
pub(crate) fn end_of<E: Display>(
    done: Result<(), E>,
    output_error: impl Fn(&E) -> Option<&io::Error>,
) -> ExitCode {
    let Err(error) = done else { return ExitCode::Ok };
    if output_error(&error).is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::Ok;
    }
    crash_report::to_stderr(format!("Error: {error}\n").as_bytes());
    ExitCode::Generic
}
