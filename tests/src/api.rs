//! A blocking client of the HTTP API over its Unix socket, with one kept-alive connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The time limit of one response.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// A response.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The header fields, in order.
    pub headers: Vec<(String, String)>,
    /// The body; empty if there is none.
    pub body: String,
}

impl Response {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("response is not JSON: {}", self.body))
    }

    /// The text of an error response (`fault_message`); empty for others.
    pub fn fault(&self) -> String {
        let body = self.json().unwrap_or_default();
        body.get("fault_message").and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// A header's value. The case of the name does not matter.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The response if its status is a success (2xx), else an error that contains the body.
    pub fn ok(self) -> Result<Response> {
        if !(200..300).contains(&self.status) {
            bail!("the API answered {}: {}", self.status, self.body);
        }
        Ok(self)
    }
}

/// A client of the API, which connects at its first request.
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
                    return Err(error.context(format!("no response of the API within {timeout:?}")));
                }
                // Nothing notifies of a new socket.
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

    /// Sends any request, with an unchecked body.
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

    /// Sends any bytes, and reads one response.
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

    /// Sends `PUT path` on another connection, without waiting for the response: see
    /// [`read_response`].
    pub fn begin_put(&self, path: &str, body: &Value) -> Result<UnixStream> {
        let (body, mut connection) = (body.to_string(), self.connect()?);
        let length = body.len();
        write!(connection, "PUT {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}")
            .context("cannot send")?;
        Ok(connection)
    }

    /// Opens another connection.
    pub fn connect(&self) -> Result<UnixStream> {
        let connection = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to {}", self.socket.display()))?;
        connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        connection.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(connection)
    }
}

/// Reads one response from a connection. Further bytes are an error.
pub fn read_response(connection: &mut impl Read) -> Result<Response> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if let Some(response) = parse(&bytes)? {
            return Ok(response);
        }
        match connection.read(&mut chunk).context("cannot read the response")? {
            0 if bytes.is_empty() => bail!("connection closed without a response"),
            0 => bail!("connection closed within a response: {}", String::from_utf8_lossy(&bytes)),
            len => bytes.extend_from_slice(&chunk[..len]),
        }
    }
}

/// The response in `bytes`, or `None` if it is not complete.
fn parse(bytes: &[u8]) -> Result<Option<Response>> {
    let mut fields = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(head_len) = head.parse(bytes).context("response is not HTTP")? else {
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
        bail!("more after the response: {}", String::from_utf8_lossy(&bytes[head_len + length..]));
    }
    let body = String::from_utf8(body.to_vec()).context("the body is not UTF-8")?;
    Ok(Some(Response { status: head.code.context("the response has no status")?, headers, body }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that returns one byte at a time.
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
    fn a_response_ends_with_its_body() {
        let text = b"HTTP/1.1 400 \r\nServer: x\r\nContent-Length: 21\r\n\r\n{\"fault_message\":\"a\"}";
        let response = read_response(&mut Drip(text)).unwrap();
        assert_eq!((response.status, response.fault().as_str()), (400, "a"));
        assert_eq!(response.header("server"), Some("x"));
    }

    #[test]
    fn a_response_without_a_length_has_no_body() {
        let response = read_response(&mut Drip(b"HTTP/1.1 204 \r\n\r\n")).unwrap();
        assert_eq!((response.status, response.body.as_str()), (204, ""));
    }

    #[test]
    fn a_truncated_response_differs_from_none() {
        let closed = read_response(&mut Drip(b"")).unwrap_err().to_string();
        let cut = read_response(&mut Drip(b"HTTP/1.1 200 \r\nContent-Len")).unwrap_err().to_string();
        assert!(closed.contains("without a response"), "{closed}");
        assert!(cut.contains("within a response"), "{cut}");
    }

    #[test]
    fn bytes_after_a_response_are_an_error() {
        let error = read_response(&mut &b"HTTP/1.1 204 \r\n\r\nHTTP/1.1"[..]).unwrap_err();
        assert!(error.to_string().contains("more after"), "{error}");
    }
}
