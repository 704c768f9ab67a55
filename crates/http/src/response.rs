//! Responses as bytes.

use std::borrow::Cow;

use crate::version::Version;

/// A response. [`Response::put`] writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The reason phrase; may be empty.
    pub reason: &'static str,
    /// Name and value of one more header.
    pub header: Option<(&'static str, String)>,
    /// Media type and text of the body, if the response has one.
    pub content: Option<(&'static str, Cow<'static, str>)>,
    /// Whether to omit the body and only state its type and length, in response to `HEAD`.
    pub head_only: bool,
}

impl Response {
    /// A response without body.
    pub fn new(status: u16, reason: &'static str) -> Response {
        Response { status, reason, header: None, content: None, head_only: false }
    }

    /// Appends the bytes of the response to `out`: the headers that Firecracker sends, in its
    /// order.
    pub fn put(&self, version: Version, keep_alive: bool, out: &mut Vec<u8>) {
        let (version, status, reason) = (version.name(), self.status, self.reason);
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut put = |text: &str| out.extend_from_slice(text.as_bytes());
        put(&format!(
            "{version} {status} {reason}\r\nServer: Firecracker API\r\nConnection: {connection}\r\n"
        ));
        if let Some((name, value)) = &self.header {
            put(&format!("{name}: {value}\r\n"));
        }
        if let Some((media_type, body)) = &self.content {
            put(&format!("Content-Type: {media_type}\r\nContent-Length: {}\r\n", body.len()));
        }
        put("\r\n");
        if let (Some((_, body)), false) = (&self.content, self.head_only) {
            put(body);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(response: &Response, version: Version, keep_alive: bool) -> String {
        let mut out = b"before ".to_vec();
        response.put(version, keep_alive, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn response_without_content_has_no_length() {
        assert_eq!(
            text(&Response::new(204, ""), Version::Http11, true),
            "before HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn head_only_response_states_the_length_of_the_omitted_body() {
        let whole = Response {
            header: Some(("A", "b".into())),
            content: Some(("text/plain", "abc".into())),
            ..Response::new(200, "OK")
        };
        let head = "before HTTP/1.0 200 OK\r\nServer: Firecracker API\r\nConnection: close\r\nA: b\r\n\
                    Content-Type: text/plain\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(text(&whole, Version::Http10, false), format!("{head}abc"));
        let head_only = Response { head_only: true, ..whole };
        assert_eq!(text(&head_only, Version::Http10, false), head);
    }
}
