//! Requests to the metadata service: what one asks for, from its head.

use vesta_http::{HeadError, RequestHead, Response, Version};

use super::limits::MAX_BODY;
use super::response;
use crate::store::Format;

/// Method of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Put,
    /// A method of HTTP that Firecracker reads and does not allow.
    NotAllowed,
    /// Not supported. Kept apart from [`Method::Other`] because its response has no body.
    Head,
    /// Any other; not supported.
    Other,
}

/// A request without its body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// Path of the target, without host and query.
    pub(crate) path: String,
    /// Format that `Accept` asks for.
    pub(crate) format: Format,
    /// Session token of the request, if it has one.
    pub(crate) token: Option<Vec<u8>>,
    /// Lifetime asked for in a token request, in the header of that name.
    pub(crate) ttl: Option<(TtlHeader, Vec<u8>)>,
    /// Whether the request came through a proxy.
    pub(crate) is_forwarded: bool,
    /// Whether the connection stays open after the response.
    pub(crate) keep_alive: bool,
    /// The version to respond in.
    pub(crate) version: Version,
    /// Length of the body that follows, in bytes.
    pub(crate) body_len: u64,
}

/// The header that carries the lifetime of a token, by name. The response has the same header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TtlHeader {
    /// Firecracker's name.
    Mmds,
    /// EC2's name.
    Ec2,
}

impl TtlHeader {
    pub(crate) fn name(self) -> &'static str {
        match self {
            TtlHeader::Mmds => "X-metadata-token-ttl-seconds",
            TtlHeader::Ec2 => "X-aws-ec2-metadata-token-ttl-seconds",
        }
    }
}

const TOKEN_HEADERS: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];

impl Request {
    /// Reads a request from its head. The error is the response after which the connection closes.
    pub(super) fn from_head(head: &RequestHead<'_>) -> Result<Request, Response> {
        let path = path_of(head.path)?.to_owned();
        let framing = head.framing().map_err(|error| refusal(&error))?;
        let method = match head.method {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            "PATCH" | "DELETE" => Method::NotAllowed,
            "HEAD" => Method::Head,
            _ => Method::Other,
        };
        let is_supported = matches!(method, Method::Get | Method::Put | Method::NotAllowed);
        if framing.body_len > 0 && is_supported {
            // As Firecracker, which does not read bodies: none is as long as its head says.
            return Err(response::text(400, "Invalid request."));
        }
        if framing.body_len > MAX_BODY {
            return Err(response::text(413, "No request to this service has a body."));
        }
        let mut request = Request {
            method,
            path,
            format: Format::Text,
            token: None,
            ttl: None,
            is_forwarded: false,
            keep_alive: framing.keep_alive,
            version: head.version,
            body_len: framing.body_len,
        };
        for (name, value) in head.headers() {
            request.read_header(name, value);
        }
        Ok(request)
    }

    fn read_header(&mut self, name: &str, value: &[u8]) {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        if is("Accept") {
            self.format = accepted(value);
        } else if TOKEN_HEADERS.into_iter().any(is) {
            self.token = Some(value.to_vec());
        } else if let Some(ttl) = [TtlHeader::Mmds, TtlHeader::Ec2].into_iter().find(|ttl| is(ttl.name())) {
            self.ttl = Some((ttl, value.to_vec()));
        } else if is("X-Forwarded-For") {
            self.is_forwarded = true;
        } else if is("Expect") {
            // The response is sent at once. It is uncertain whether the client then sends its body.
            self.keep_alive = false;
        }
    }
}

/// The response to a request whose head is bad.
pub(super) fn refusal(error: &HeadError) -> Response {
    let status = match error {
        HeadError::TooLong { .. } | HeadError::TooManyHeaders { .. } => 431,
        HeadError::Malformed(_) | HeadError::BadContentLength(_) | HeadError::TransferEncoding(_) => 400,
    };
    response::text(status, &format!("Bad request: {error}."))
}

/// The path of a request's target, without its query.
fn path_of(target: &str) -> Result<&str, Response> {
    if !target.starts_with('/') {
        return Err(response::text(400, "Invalid URI."));
    }
    Ok(target.split(['?', '#']).next().unwrap_or_default())
}

/// The format that an `Accept` header asks for: JSON if it is listed with at least the quality of
/// text (RFC 9110, 12.5.1).
fn accepted(value: &[u8]) -> Format {
    let mut wanted = [0_u16; 2];
    for range in value.split(|&byte| byte == b',') {
        let mut parts = range.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
        let name = parts.next().unwrap_or_default().to_ascii_lowercase();
        let quality = parts.find_map(|part| part.strip_prefix(b"q=").map(thousandths)).unwrap_or(1000);
        match name.as_slice() {
            b"application/json" => wanted[0] = quality,
            b"text/plain" => wanted[1] = quality,
            _ => {}
        }
    }
    if wanted[0] > 0 && wanted[0] >= wanted[1] { Format::Json } else { Format::Text }
}

/// Parses a quality between 0 and 1, in thousandths. Anything else counts as 0 or is clamped.
fn thousandths(text: &[u8]) -> u16 {
    let number = str::from_utf8(text).ok().and_then(|text| text.parse::<f32>().ok()).unwrap_or(0.0);
    // The cast saturates, and NaN becomes 0.
    #[expect(clippy::cast_sign_loss, reason = "clamped")]
    let thousandths = (number.clamp(0.0, 1.0) * 1000.0) as u16;
    thousandths
}

#[cfg(test)]
mod tests {
    use vesta_http::{HeadParser, NO_HEADER};

    use super::*;
    use crate::http::limits::{MAX_HEAD, MAX_HEADERS};

    fn parse(text: &str) -> Result<Request, Response> {
        let mut headers = [NO_HEADER; MAX_HEADERS];
        let head = HeadParser::new(MAX_HEAD).parse(text.as_bytes(), &mut headers);
        let head = head.map_err(|error| refusal(&error))?.expect("the head is complete");
        assert_eq!(head.len, text.len());
        Request::from_head(&head)
    }

    fn request(text: &str) -> Request {
        parse(text).unwrap()
    }

    fn with(header: &str) -> Request {
        request(&format!("GET / HTTP/1.1\r\n{header}\r\n\r\n"))
    }

    fn refused(text: &str) -> u16 {
        parse(text).unwrap_err().status
    }

    #[test]
    fn request_has_a_method_and_a_path() {
        for (line, method, path) in [
            ("GET /a/b HTTP/1.1", Method::Get, "/a/b"),
            ("PUT /latest/api/token HTTP/1.1", Method::Put, "/latest/api/token"),
            ("POST / HTTP/1.0", Method::Other, "/"),
            ("PATCH / HTTP/1.1", Method::NotAllowed, "/"),
            ("DELETE / HTTP/1.1", Method::NotAllowed, "/"),
            ("HEAD / HTTP/1.1", Method::Head, "/"),
            ("GET http://169.254.169.254/a?b=/c HTTP/1.1", Method::Get, "/a"),
            ("GET http://169.254.169.254 HTTP/1.1", Method::Get, "/"),
        ] {
            let request = request(&format!("{line}\r\n\r\n"));
            assert_eq!((request.method, request.path.as_str()), (method, path), "{line}");
        }
    }

    #[test]
    fn accept_header_decides_the_format() {
        for (accept, format) in [
            ("application/json", Format::Json),
            ("Application/JSON; charset=utf-8", Format::Json),
            ("text/plain, application/json", Format::Json),
            ("text/plain, application/json;q=0.5", Format::Text),
            ("application/json;q=0", Format::Text),
            ("application/json;q=x", Format::Text),
            ("application/json;q=NaN", Format::Text),
            ("text/plain", Format::Text),
            ("*/*", Format::Text),
            ("", Format::Text),
        ] {
            assert_eq!(with(&format!("Accept: {accept}")).format, format, "{accept}");
        }
    }

    #[test]
    fn token_and_ttl_headers_have_two_names() {
        assert_eq!(with("x-metadata-token: abc").token.as_deref(), Some(&b"abc"[..]));
        assert_eq!(with("X-aws-ec2-metadata-token:abc ").token.as_deref(), Some(&b"abc"[..]));
        assert_eq!(with("X-Metadata-Token-TTL-Seconds: 60").ttl, Some((TtlHeader::Mmds, b"60".to_vec())));
        assert_eq!(
            with("X-aws-ec2-metadata-token-ttl-seconds: 6").ttl,
            Some((TtlHeader::Ec2, b"6".to_vec()))
        );
    }

    #[test]
    fn version_and_headers_decide_keep_alive() {
        for (text, keep_alive) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nConnection: close\r\nConnection: keep-alive\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true),
            ("POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", false),
        ] {
            assert_eq!(request(text).keep_alive, keep_alive, "{text}");
        }
    }

    #[test]
    fn invalid_heads_are_refused() {
        for (text, status) in [
            ("hello\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\n\r\n", 400),
            ("GET a HTTP/1.1\r\n\r\n", 400),
            ("OPTIONS * HTTP/1.1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 400),
            ("PUT /latest/api/token HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", 413),
        ] {
            assert_eq!(refused(text), status, "{text}");
        }
        assert_eq!(refused(&format!("GET / HTTP/1.1\r\n{}\r\n", "a:b\r\n".repeat(MAX_HEADERS + 1))), 431);
    }
}
