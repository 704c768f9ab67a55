//! The log's lines about requests of the API. Tools match them, so they are Firecracker's:
//!
//! ```text
//! The API server received a Put request on "/vm" with body "{\"state\":\"Paused\"}".
//! The request was executed successfully. Status code: 204 No Content.
//! 'pause vm' API request took 812 us.
//! Total previous API call duration: 830 us.
//! ```
//!
//! The last is of level Debug. In the place of the second is `Received Error. Status code: 400 Bad
//! Request. Message: ...`, of level Error, if the request failed.
//!
//! # Invariants
//!
//! - A request is not copied: what is shown of a body is at most [`MOST_OF_BODY`] bytes.
//! - No contents of a metadata service are shown, whichever request has them: they hold secrets.
//! - Lines have Firecracker's module as their target, and are not limited in number.

use std::borrow::Cow;
use std::path::Path;
use std::time::Instant;

use crate::Command;
use crate::http::Request;
use crate::metrics::Operation;

/// The target of the lines.
const TARGET: &str = "firecracker::api_server";
/// Most bytes of a body that are shown.
const MOST_OF_BODY: usize = 2048;

/// A request that is being answered.
#[derive(Debug)]
pub(super) struct Received {
    /// When it arrived.
    pub(super) at: Instant,
    /// The operation that it asks for.
    pub(super) operation: Option<Operation>,
}

/// The outcome of a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Outcome<'a> {
    /// Success, with a body.
    Ok,
    /// Success, without a body.
    NoContent,
    /// An error, and its text.
    BadRequest(&'a str),
    /// A request that is over a limit, and the error's text.
    TooLarge(&'a str),
    /// Too many clients ask for the same, and the error's text.
    Unavailable(&'a str),
}

/// Logs that clients can connect.
pub(super) fn listening(path: &Path) {
    let path = path.to_string_lossy();
    log::info!(target: "firecracker::api_server_adapter", "Listening on API socket ({path:?}).");
}

/// Logs that the API is served. On the thread that serves it.
pub(super) fn server_started() {
    log::info!(target: TARGET, "API server started.");
}

impl Received {
    /// Logs that a request arrived.
    pub(super) fn log(request: &Request) -> Received {
        let body = Shown::of(request);
        log::info!(target: TARGET, "The API server received a {:?} request on {:?}{body}.", request.method, request.path);
        Received { at: Instant::now(), operation: None }
    }

    /// Notes what it does, and warns if it uses something deprecated.
    pub(super) fn is_for(&mut self, command: &Command, deprecated: bool) {
        self.operation = Operation::of(command);
        if deprecated {
            log::warn!(target: TARGET, "{}: a field or value of the request is deprecated", command.name());
        }
    }

    /// Logs its answer.
    pub(super) fn answered(self, outcome: Outcome<'_>) {
        match outcome {
            Outcome::Ok => succeeded("200 OK"),
            Outcome::NoContent => succeeded("204 No Content"),
            Outcome::BadRequest(message) => failed("400 Bad Request", message),
            Outcome::TooLarge(message) => failed("413 Payload too large", message),
            Outcome::Unavailable(message) => failed("503 Service Unavailable", message),
        }
        let took = self.at.elapsed().as_micros();
        if let (Some(operation), Outcome::Ok | Outcome::NoContent) = (self.operation, outcome) {
            log::info!(target: TARGET, "'{}' API request took {took} us.", operation.name_in_log());
        }
        log::debug!(target: TARGET, "Total previous API call duration: {took} us.");
    }
}

/// Logs bytes that are no request, and their answer.
pub(super) fn refused(message: &str) {
    failed("400 Bad Request", message);
}

fn succeeded(status: &str) {
    log::info!(target: TARGET, "The request was executed successfully. Status code: {status}.");
}

fn failed(status: &str, message: &str) {
    log::error!(target: TARGET, "Received Error. Status code: {status}. Message: {message}");
}

/// What is shown of a request's body.
#[derive(Debug, PartialEq, Eq)]
enum Shown<'a> {
    /// There is none, or it is secret.
    Nothing,
    /// A CPU template, unless the level is Debug.
    OnlyInDebug,
    /// Its beginning, and how many bytes are left out.
    Body(Cow<'a, str>, usize),
}

impl Shown<'_> {
    fn of(request: &Request) -> Shown<'_> {
        // A query or fragment makes the path none of an endpoint, but the body may be the same.
        let segments = request.path.split('/').filter_map(|segment| segment.split(['?', '#']).next());
        let mut segments = segments.filter(|segment| !segment.is_empty());
        let body = request.body.as_slice();
        match (segments.next(), segments.next()) {
            _ if body.is_empty() => Shown::Nothing,
            (Some("mmds"), Some("config")) => Shown::beginning(body),
            // A fork may have the contents for its children.
            (Some("mmds" | "fork"), _) => Shown::Nothing,
            (Some("cpu-config"), _) if !log::log_enabled!(log::Level::Debug) => Shown::OnlyInDebug,
            _ => Shown::beginning(body),
        }
    }

    fn beginning(body: &[u8]) -> Shown<'_> {
        let len = body.len().min(MOST_OF_BODY);
        Shown::Body(String::from_utf8_lossy(&body[..len]), body.len() - len)
    }
}

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Shown::Nothing => Ok(()),
            Shown::OnlyInDebug => {
                f.write_str(". To view the CPU template received by the API, configure log-level to DEBUG")
            }
            Shown::Body(text, 0) => write!(f, " with body {text:?}"),
            Shown::Body(text, more) => write!(f, " with body {text:?} and {more} bytes more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{Decoded, Decoder};

    /// What is shown of a request's body.
    fn shown(path: &str, body: &[u8]) -> String {
        let mut decoder = Decoder::new(1024, 1 << 20);
        decoder.push(format!("PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes());
        decoder.push(body);
        match decoder.next() {
            Decoded::Request(request) => Shown::of(&request).to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bodies_are_shown_without_secrets() {
        for (path, wanted) in [
            ("/vm", r#" with body "{\"a\":\"b\\n\"}""#),
            ("/mmds/config", r#" with body "{\"a\":\"b\\n\"}""#),
            ("/mmds", ""),
            ("//mmds/", ""),
            ("/mmds//x", ""),
            ("/mmds?x", ""),
            ("/fork#x", ""),
            ("/fork", ""),
        ] {
            assert_eq!(shown(path, br#"{"a":"b\n"}"#), wanted, "{path}");
        }
        assert_eq!(shown("/vm", b""), "");
        assert!(shown("/cpu-config", b"{}").starts_with(". To view the CPU template"));
    }

    #[test]
    fn long_and_binary_bodies_are_bounded() {
        let long = shown("/vm", &vec![b'a'; 100_000]);
        assert!(long.len() < 3000 && long.ends_with("and 97952 bytes more"), "{long}");
        assert_eq!(shown("/vm", b"\xff\0\n"), " with body \"\u{fffd}\\0\\n\"");
    }
}
