//! Responses of the metadata service.

use vesta_http::Response;

/// A response with a message as plain text.
pub(crate) fn text(status: u16, message: &str) -> Response {
    Response {
        content: Some(("text/plain", message.to_owned().into())),
        ..Response::new(status, reason(status))
    }
}

/// 200, with the value that the guest asked for.
pub(crate) fn found(value: String, media_type: &'static str) -> Response {
    Response { content: Some((media_type, value.into())), ..Response::new(200, reason(200)) }
}

/// The reason phrase of a status code (RFC 9110, section 15).
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
