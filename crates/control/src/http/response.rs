//! From answers to bytes.

use serde_json::Value;

use super::{ProtocolError, Version};

/// What a client gets that connects while as many are connected as may be.
pub const TOO_MANY_CONNECTIONS: &[u8] = b"HTTP/1.1 503\r\n\
    Server: Firecracker API\r\n\
    Connection: close\r\n\
    Content-Length: 40\r\n\
    \r\n\
    { \"error\": \"Too many open connections\" }";

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    status: u16,
    body: Option<String>,
    deprecated: bool,
}

impl Response {
    /// Done, with nothing to say.
    pub fn no_content() -> Response {
        Response { status: 204, body: None, deprecated: false }
    }

    /// What was asked for.
    pub fn ok(body: &Value) -> Response {
        Response { status: 200, body: Some(body.to_string()), deprecated: false }
    }

    /// What the API refuses: `{"fault_message":"..."}`.
    pub fn fault(message: &str) -> Response {
        let body = serde_json::json!({ "fault_message": message });
        Response { status: 400, body: Some(body.to_string()), deprecated: false }
    }

    /// What the API has no room for, in the same shape.
    pub fn too_large(message: &str) -> Response {
        Response { status: 413, ..Response::fault(message) }
    }

    /// What is refused before the API sees it: `{ "error": "..." }`.
    pub fn protocol_error(error: &ProtocolError) -> Response {
        let body = match error {
            // To the byte what clients of Firecracker get, the bare line feed in the string included.
            ProtocolError::PayloadTooLarge { .. } => {
                format!("{{ \"error\": \"{error}\nAll previous unanswered requests will be dropped.\" }}")
            }
            _ => format!("{{ \"error\": {} }}", Value::from(error.to_string())),
        };
        Response { status: 400, body: Some(body), deprecated: false }
    }

    /// Says so if the request used something deprecated.
    #[must_use]
    pub fn deprecated(self, deprecated: bool) -> Response {
        Response { deprecated, ..self }
    }

    /// Appends the answer's bytes to `out`.
    pub fn put(&self, version: Version, keep_alive: bool, out: &mut Vec<u8>) {
        put_start(self.status, version, keep_alive, out);
        if self.deprecated {
            out.extend_from_slice(b"Deprecation: true\r\n");
        }
        if let Some(body) = &self.body {
            out.extend_from_slice(b"Content-Type: application/json\r\n");
            out.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
        }
        out.extend_from_slice(b"\r\n");
        if let Some(body) = &self.body {
            out.extend_from_slice(body.as_bytes());
        }
    }
}

/// Appends to `out` the word that a client's body is welcome.
pub fn put_continue(version: Version, out: &mut Vec<u8>) {
    put_start(100, version, true, out);
    out.extend_from_slice(b"\r\n");
}

/// The status line, which ends in the space before the reason that is not given, and the headers of every answer.
fn put_start(status: u16, version: Version, keep_alive: bool, out: &mut Vec<u8>) {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let start =
        format!("{} {status} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n", version.name());
    out.extend_from_slice(start.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(response: &Response, version: Version, keep_alive: bool) -> String {
        let mut out = Vec::new();
        response.put(version, keep_alive, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_empty_answer_has_no_reason_phrase_and_no_length() {
        assert_eq!(
            text(&Response::no_content(), Version::Http11, true),
            "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn headers_come_in_firecrackers_order() {
        assert_eq!(
            text(&Response::ok(&serde_json::json!({"a": 1})).deprecated(true), Version::Http10, false),
            "HTTP/1.0 200 \r\nServer: Firecracker API\r\nConnection: close\r\nDeprecation: true\r\n\
             Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}"
        );
    }

    #[test]
    fn a_fault_is_json_whatever_its_message() {
        let answer = text(&Response::fault("a \"quoted\"\nword"), Version::Http11, true);
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, r#"{"fault_message":"a \"quoted\"\nword"}"#);
    }

    #[test]
    fn what_there_is_no_room_for_is_a_fault_with_a_status_of_its_own() {
        let answer = text(&Response::too_large("x"), Version::Http11, true);
        assert!(answer.starts_with("HTTP/1.1 413 \r\n") && answer.ends_with(r#"{"fault_message":"x"}"#));
    }

    #[test]
    fn a_payload_too_large_is_answered_to_the_byte() {
        let error = ProtocolError::PayloadTooLarge { size: 260, limit: 250 };
        assert_eq!(
            text(&Response::protocol_error(&error), Version::Http11, true),
            "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 145\r\n\r\n\
             { \"error\": \"Request payload with size 260 is larger than the limit of 250 allowed by server.\n\
             All previous unanswered requests will be dropped.\" }"
        );
    }

    #[test]
    fn other_protocol_errors_are_json_whatever_their_message() {
        let error = ProtocolError::BadContentLength("\"\n".into());
        let answer = text(&Response::protocol_error(&error), Version::Http11, false);
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        assert!(body["error"].as_str().unwrap().contains("\"\n"));
    }

    #[test]
    fn one_connection_too_many_is_told_so_with_the_right_length() {
        let answer = str::from_utf8(TOO_MANY_CONNECTIONS).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 503\r\n"));
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
    }
}
