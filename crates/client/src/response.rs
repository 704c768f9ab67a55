//! [`Response`]: one HTTP response, and how it is read from a stream.

use std::io::{self, Read};

use vesta_http::{NO_HEADER, ResponseHead};

use crate::error::ProtocolError;

/// Most bytes of a response's head.
const MAX_HEAD: usize = 16 << 10;
/// Most headers of a response.
const MAX_HEADERS: usize = 32;
/// Most bytes of a response's body. The longest answers are those to `GET /mmds`.
const MAX_BODY: u64 = 64 << 20;
/// Bytes of one read.
const READ_LEN: usize = 4096;

/// A response, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Names and values of the headers, in order.
    pub headers: Vec<(String, String)>,
    /// The body; empty if there is none.
    pub body: String,
}

/// Why [`Response::read`] returned no response.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The stream ended before the first byte of a response.
    #[error("the connection was closed without a response")]
    Closed,
    /// Reading failed.
    #[error("cannot read the response: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no response that can be read.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

impl Response {
    /// Reads one response. Bytes after it are an error, because every answer must belong to a
    /// request.
    ///
    /// `read` must wait for bytes. An error of kind `Interrupted` is retried.
    pub fn read(stream: &mut impl Read) -> Result<Response, ReadError> {
        let mut bytes = Vec::new();
        let mut chunk = [0; READ_LEN];
        loop {
            match stream.read(&mut chunk) {
                Ok(0) if bytes.is_empty() => return Err(ReadError::Closed),
                Ok(0) => return Err(ProtocolError::Truncated(lossy(&bytes)).into()),
                Ok(len) => bytes.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            if let Some(response) = Response::parse(&bytes)? {
                return Ok(response);
            }
        }
    }

    /// The response in `bytes`, or `None` if it is not complete.
    fn parse(bytes: &[u8]) -> Result<Option<Response>, ProtocolError> {
        let mut headers = [NO_HEADER; MAX_HEADERS];
        let Some(head) = ResponseHead::parse(bytes, &mut headers)? else {
            if bytes.len() >= MAX_HEAD {
                return Err(ProtocolError::HeadTooLong { limit: MAX_HEAD });
            }
            return Ok(None);
        };
        let len = head.body_len()?;
        if len > MAX_BODY {
            return Err(ProtocolError::BodyTooLong { len, limit: MAX_BODY });
        }
        let end = head.len + usize::try_from(len).expect("64 MiB fit");
        let Some(body) = bytes.get(head.len..end) else { return Ok(None) };
        if bytes.len() > end {
            return Err(ProtocolError::Excess(lossy(&bytes[end..])));
        }
        let body = String::from_utf8(body.to_vec()).map_err(|_| ProtocolError::NotUtf8)?;
        let headers = head.headers().map(|(name, value)| (name.to_owned(), lossy(value))).collect();
        Ok(Some(Response { status: head.status, headers, body }))
    }

    /// The value of a header. The case of the name does not matter.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether the status is a success (2xx).
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Whether another request can follow on the connection: the monitor keeps it open, and this
    /// response is not an interim one (1xx), which another follows.
    pub fn keeps_connection(&self) -> bool {
        self.status >= 200
            && !self.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    /// The reason of a refusal: `fault_message` of the API, or `error` of the protocol below it.
    /// The body as it is, if it has neither; empty for a success.
    pub fn fault_message(&self) -> String {
        #[derive(serde::Deserialize)]
        struct Fault {
            #[serde(alias = "error")]
            fault_message: String,
        }
        if self.is_success() {
            return String::new();
        }
        serde_json::from_str::<Fault>(&self.body)
            .map_or_else(|_| self.body.clone(), |fault| fault.fault_message)
    }
}

/// The start of `bytes` as text.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(READ_LEN)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that returns `.1` bytes at a time.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let len = self.1.min(self.0.len()).min(buffer.len());
            let (first, rest) = self.0.split_at(len);
            buffer[..len].copy_from_slice(first);
            self.0 = rest;
            Ok(len)
        }
    }

    fn read(text: &str, size: usize) -> Result<Response, ReadError> {
        Response::read(&mut Pieces(text.as_bytes(), size))
    }

    const REFUSAL: &str = "HTTP/1.1 400 \r\nServer: x\r\nContent-Length: 21\r\n\r\n{\"fault_message\":\"a\"}";

    #[test]
    fn response_is_the_same_however_its_bytes_arrive() {
        let whole = read(REFUSAL, usize::MAX).unwrap();
        assert_eq!((whole.status, whole.header("SERVER")), (400, Some("x")));
        assert_eq!(whole.fault_message(), "a");
        for size in 1..REFUSAL.len() {
            assert_eq!(read(REFUSAL, size).unwrap(), whole);
        }
    }

    #[test]
    fn response_without_a_length_has_no_body() {
        let response = read("HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n", 1).unwrap();
        assert_eq!((response.status, response.body.as_str()), (204, ""));
        assert!(response.keeps_connection() && response.is_success());
        assert!(!read("HTTP/1.1 204 \r\nConnection: close\r\n\r\n", 1).unwrap().keeps_connection());
    }

    #[test]
    fn truncated_response_differs_from_none() {
        assert!(matches!(read("", 1), Err(ReadError::Closed)));
        let cut = read(&REFUSAL[..REFUSAL.len() - 1], 7).unwrap_err();
        assert!(matches!(cut, ReadError::Protocol(ProtocolError::Truncated(_))), "{cut}");
    }

    #[test]
    fn bytes_after_a_response_are_an_error() {
        let error = read("HTTP/1.1 204 \r\n\r\nHTTP/1.1", usize::MAX).unwrap_err();
        assert!(matches!(error, ReadError::Protocol(ProtocolError::Excess(_))), "{error}");
    }

    #[test]
    fn endless_heads_and_huge_bodies_are_refused() {
        let head = format!("HTTP/1.1 200 \r\na: {}", "x".repeat(2 * MAX_HEAD));
        let error = read(&head, READ_LEN).unwrap_err();
        assert!(matches!(error, ReadError::Protocol(ProtocolError::HeadTooLong { .. })), "{error}");
        let error = read("HTTP/1.1 200 \r\nContent-Length: 67108865\r\n\r\n", READ_LEN).unwrap_err();
        assert!(error.to_string().contains("67108865 bytes; at most 67108864"), "{error}");
    }

    #[test]
    fn fault_message_falls_back_to_the_body() {
        let with = |body: &str| {
            let head = format!("HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n", body.len());
            read(&(head + body), 9).unwrap().fault_message()
        };
        assert_eq!(with(r#"{ "error": "too many" }"#), "too many");
        assert_eq!(with("plain"), "plain");
    }
}
