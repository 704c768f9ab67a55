//! A client of the HTTP API over its Unix socket: blocking, one connection, kept alive.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long one answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Header fields in order, as they came.
    pub headers: Vec<(String, String)>,
    /// The body, empty where there is none.
    pub body: String,
}

impl Response {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("the body is not JSON: {}", self.body))
    }

    /// The text of an error that the API answers with (`fault_message`), empty where it is none.
    pub fn fault(&self) -> String {
        let body = self.json().unwrap_or_default();
        body.get("fault_message").and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// A header's value, by its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The answer itself where it is a success (2xx), an error with all of it else.
    pub fn ok(self) -> Result<Response> {
        if !(200..300).contains(&self.status) {
            bail!("the API answered {}: {}", self.status, self.body);
        }
        Ok(self)
    }
}

/// A connection to the API, made when it is first needed.
#[derive(Debug)]
pub struct ApiClient {
    socket: PathBuf,
    connection: Option<UnixStream>,
}

impl ApiClient {
    /// A client of the API at this socket.
    pub fn new(socket: &Path) -> ApiClient {
        ApiClient { socket: socket.to_owned(), connection: None }
    }

    /// Waits until the API answers `GET /`.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Response> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.get("/") {
                Ok(response) => return Ok(response),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("the API did not answer within {timeout:?}")));
                }
                // The socket's file appears without notice.
                Err(_) => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    /// `GET path`.
    pub fn get(&mut self, path: &str) -> Result<Response> {
        self.request("GET", path, None)
    }

    /// `PUT path`.
    pub fn put(&mut self, path: &str, body: &Value) -> Result<Response> {
        self.request("PUT", path, Some(&body.to_string()))
    }

    /// `PATCH path`.
    pub fn patch(&mut self, path: &str, body: &Value) -> Result<Response> {
        self.request("PATCH", path, Some(&body.to_string()))
    }

    /// `DELETE path`.
    pub fn delete(&mut self, path: &str) -> Result<Response> {
        self.request("DELETE", path, None)
    }

    /// Any request, with its body as it is.
    pub fn request(&mut self, method: &str, path: &str, body: Option<&str>) -> Result<Response> {
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        let message = match body {
            None => format!("{head}\r\n"),
            Some(body) => {
                let length = body.len();
                format!("{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
            }
        };
        self.send_raw(message.as_bytes()).with_context(|| format!("{method} {path}"))
    }

    /// Sends these bytes, whatever they are, and reads one answer.
    pub fn send_raw(&mut self, message: &[u8]) -> Result<Response> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        connection.write_all(message).context("cannot send")?;
        let response = read_response(&mut connection)?;
        if response.header("connection") != Some("close") {
            self.connection = Some(connection);
        }
        Ok(response)
    }

    /// A new connection of its own.
    pub fn connect(&self) -> Result<UnixStream> {
        let connection = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to {}", self.socket.display()))?;
        connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        connection.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(connection)
    }
}

/// Reads one answer from a connection, and not a byte more.
pub fn read_response(connection: &mut impl Read) -> Result<Response> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if let Some(response) = parse(&bytes)? {
            return Ok(response);
        }
        match connection.read(&mut chunk).context("cannot read the answer")? {
            0 if bytes.is_empty() => bail!("the connection was closed without an answer"),
            0 => bail!("the connection was closed within an answer: {}", String::from_utf8_lossy(&bytes)),
            len => bytes.extend_from_slice(&chunk[..len]),
        }
    }
}

/// The answer in `bytes`, where all of it is there.
fn parse(bytes: &[u8]) -> Result<Option<Response>> {
    let mut fields = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(head_len) = head.parse(bytes).context("what came is not HTTP")? else {
        return Ok(None);
    };
    let headers: Vec<(String, String)> = head
        .headers
        .iter()
        .map(|field| (field.name.to_owned(), String::from_utf8_lossy(field.value).into_owned()))
        .collect();
    let length = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.map_or(Ok(0), |(_, value)| value.parse()).context("Content-Length")?;
    let Some(body) = bytes.get(head_len..head_len + length) else { return Ok(None) };
    if bytes.len() > head_len + length {
        bail!("there is more after the answer: {}", String::from_utf8_lossy(&bytes[head_len + length..]));
    }
    let body = String::from_utf8(body.to_vec()).context("the body is not UTF-8")?;
    Ok(Some(Response { status: head.code.context("the answer has no status")?, headers, body }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that come one at a time.
    struct Drip<'a>(&'a [u8]);

    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let Some((first, rest)) = self.0.split_first() else { return Ok(0) };
            buffer[0] = *first;
            self.0 = rest;
            Ok(1)
        }
    }

    #[test]
    fn an_answer_is_whole_when_its_body_is() {
        let text = b"HTTP/1.1 400 \r\nServer: x\r\nContent-Length: 21\r\n\r\n{\"fault_message\":\"a\"}";
        let response = read_response(&mut Drip(text)).unwrap();
        assert_eq!((response.status, response.fault().as_str()), (400, "a"));
        assert_eq!(response.header("server"), Some("x"));
    }

    #[test]
    fn an_answer_without_a_length_has_no_body() {
        let response = read_response(&mut Drip(b"HTTP/1.1 204 \r\n\r\n")).unwrap();
        assert_eq!((response.status, response.body.as_str()), (204, ""));
    }

    #[test]
    fn a_closed_connection_is_told_from_a_cut_answer() {
        let closed = read_response(&mut Drip(b"")).unwrap_err().to_string();
        let cut = read_response(&mut Drip(b"HTTP/1.1 200 \r\nContent-Len")).unwrap_err().to_string();
        assert!(closed.contains("without an answer"), "{closed}");
        assert!(cut.contains("within an answer"), "{cut}");
    }

    #[test]
    fn what_follows_an_answer_is_an_error() {
        let error = read_response(&mut &b"HTTP/1.1 204 \r\n\r\nHTTP/1.1"[..]).unwrap_err();
        assert!(error.to_string().contains("more after"), "{error}");
    }
}
