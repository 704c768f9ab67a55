//! Responses of the API as bytes.

use std::borrow::Cow;

use serde_json::Value;
use vesta_http::Version;

use super::request::ProtocolError;

/// Response to a client that connects while the most connections are open. Firecracker's bytes.
pub const TOO_MANY_CONNECTIONS: &[u8] = b"HTTP/1.1 503\r\n\
    Server: Firecracker API\r\n\
    Connection: close\r\n\
    Content-Length: 40\r\n\
    \r\n\
    { \"error\": \"Too many open connections\" }";

/// A response to an API client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response(vesta_http::Response);

impl Response {
    fn new(status: u16, body: Option<String>) -> Response {
        let content = body.map(|body| ("application/json", body.into()));
        Response(vesta_http::Response { content, ..vesta_http::Response::new(status, "") })
    }

    /// 204: success, without a body.
    pub fn no_content() -> Response {
        Response::new(204, None)
    }

    /// 200: success, with a JSON body.
    pub fn ok(body: &Value) -> Response {
        Response::new(200, Some(body.to_string()))
    }

    /// 200: success, with a text.
    pub fn text(content_type: &'static str, body: Cow<'static, str>) -> Response {
        let content = Some((content_type, body));
        Response(vesta_http::Response { content, ..vesta_http::Response::new(200, "") })
    }

    /// 400: the API refuses the request: `{"fault_message":"..."}`.
    pub fn fault(message: &str) -> Response {
        Response::new(400, Some(serde_json::json!({ "fault_message": message }).to_string()))
    }

    /// 503: so many clients do this already that one more is refused; with the body of a fault.
    pub fn unavailable(message: &str) -> Response {
        let Response(fault) = Response::fault(message);
        Response(vesta_http::Response { status: 503, ..fault })
    }

    /// 413: data over a limit of the API, with the body of a fault.
    pub fn too_large(message: &str) -> Response {
        let Response(fault) = Response::fault(message);
        Response(vesta_http::Response { status: 413, ..fault })
    }

    /// 400: a request that never reached the API: `{ "error": "..." }`.
    pub fn protocol_error(error: &ProtocolError) -> Response {
        let body = match error {
            // Firecracker's bytes, including the unescaped line feed in the string.
            ProtocolError::PayloadTooLarge { .. } => {
                format!("{{ \"error\": \"{error}\nAll previous unanswered requests will be dropped.\" }}")
            }
            _ => format!("{{ \"error\": {} }}", Value::from(error.to_string())),
        };
        Response::new(400, Some(body))
    }

    /// Sets whether the request used something deprecated, which adds the header `Deprecation`.
    #[must_use]
    pub fn deprecated(mut self, deprecated: bool) -> Response {
        self.0.header = deprecated.then(|| ("Deprecation", "true".to_owned()));
        self
    }

    /// Appends the bytes of the response to `out`. The version is HTTP/1.1, whatever the request's
    /// was (RFC 9110, 6.2).
    pub fn put(&self, keep_alive: bool, out: &mut Vec<u8>) {
        self.0.put(Version::Http11, keep_alive, out);
    }
}

/// Appends the head of a stream of server-sent events to `out`. The stream ends with the
/// connection.
pub fn put_event_stream_head(out: &mut Vec<u8>) {
    let header = Some(("Content-Type", "text/event-stream".to_owned()));
    vesta_http::Response { header, ..vesta_http::Response::new(200, "") }.put(Version::Http11, false, out);
}

/// Appends `100 Continue` to `out`, the interim response that asks a client for its body.
pub fn put_continue(out: &mut Vec<u8>) {
    Response::new(100, None).put(true, out);
}

#[cfg(test)]
mod tests {
    use vesta_http::HeadError;

    use super::*;

    fn text(response: &Response, keep_alive: bool) -> String {
        let mut out = Vec::new();
        response.put(keep_alive, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn empty_response_has_no_reason_phrase_and_no_length() {
        assert_eq!(
            text(&Response::no_content(), true),
            "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn headers_are_in_firecrackers_order() {
        assert_eq!(
            text(&Response::ok(&serde_json::json!({"a": 1})).deprecated(true), false),
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: close\r\nDeprecation: true\r\n\
             Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}"
        );
    }

    #[test]
    fn fault_escapes_its_message() {
        let response = text(&Response::fault("a \"quoted\"\nword"), true);
        let (_, body) = response.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, r#"{"fault_message":"a \"quoted\"\nword"}"#);
    }

    #[test]
    fn too_large_is_a_fault_with_status_413() {
        let response = text(&Response::too_large("x"), true);
        assert!(response.starts_with("HTTP/1.1 413 \r\n") && response.ends_with(r#"{"fault_message":"x"}"#));
    }

    #[test]
    fn event_stream_ends_with_its_connection() {
        let mut out = Vec::new();
        put_event_stream_head(&mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: close\r\n\
             Content-Type: text/event-stream\r\n\r\n"
        );
    }

    #[test]
    fn payload_too_large_has_firecrackers_bytes() {
        let error = ProtocolError::PayloadTooLarge { size: 260, limit: 250 };
        assert_eq!(
            text(&Response::protocol_error(&error), true),
            "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 145\r\n\r\n\
             { \"error\": \"Request payload with size 260 is larger than the limit of 250 allowed by server.\n\
             All previous unanswered requests will be dropped.\" }"
        );
    }

    #[test]
    fn protocol_error_escapes_its_message() {
        let error = HeadError::BadContentLength("\"\n".into()).into();
        let response = text(&Response::protocol_error(&error), false);
        let (_, body) = response.split_once("\r\n\r\n").unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        assert!(body["error"].as_str().unwrap().contains("\"\n"));
    }

    #[test]
    fn too_many_connections_states_the_right_length() {
        let response = str::from_utf8(TOO_MANY_CONNECTIONS).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 503\r\n"));
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
    }
}
