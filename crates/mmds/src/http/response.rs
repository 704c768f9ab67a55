//! From answers to bytes.

use super::Method;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Response {
    status: u16,
    content_type: &'static str,
    body: String,
    /// One more header, where there is one: its name and its value.
    header: Option<(&'static str, String)>,
}

impl Response {
    /// A word to a person or a script.
    pub(crate) fn text(status: u16, body: &str) -> Response {
        Response { status, content_type: "text/plain", body: body.to_owned(), header: None }
    }

    /// What was asked for.
    pub(crate) fn found(body: String, content_type: &'static str) -> Response {
        Response { status: 200, content_type, body, header: None }
    }

    /// With one more header.
    #[must_use]
    pub(crate) fn with(self, name: &'static str, value: String) -> Response {
        Response { header: Some((name, value)), ..self }
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> u16 {
        self.status
    }

    #[cfg(test)]
    pub(crate) fn body(&self) -> &str {
        &self.body
    }

    #[cfg(test)]
    pub(crate) fn header(&self) -> Option<(&'static str, &str)> {
        self.header.as_ref().map(|(name, value)| (*name, value.as_str()))
    }

    /// The answer's bytes: to `HEAD` only its head, which tells the length of the body that is left out.
    pub(super) fn into_bytes(self, method: Option<Method>, is_http10: bool, keep_alive: bool) -> Vec<u8> {
        let body = if method == Some(Method::Head) { "" } else { &self.body };
        let version = if is_http10 { "HTTP/1.0" } else { "HTTP/1.1" };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let more = self.header.map(|(name, value)| format!("{name}: {value}\r\n")).unwrap_or_default();
        format!(
            "{version} {} {}\r\nServer: Firecracker API\r\nConnection: {connection}\r\n{more}\
             Content-Type: {}\r\nContent-Length: {}\r\n\r\n{}",
            self.status,
            reason(self.status),
            self.content_type,
            self.body.len(),
            body
        )
        .into_bytes()
    }
}

/// RFC 9110, section 15.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        _ => "",
    }
}
