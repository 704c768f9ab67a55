//! Response heads, for clients: the status line and the headers.

use crate::head::decimal;

/// Why a response head is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    /// The bytes are not HTTP/1.x.
    #[error("not an HTTP/1.x response: {0}")]
    Malformed(httparse::Error),
    /// The head has more headers than the limit.
    #[error("more than {limit} headers")]
    TooManyHeaders {
        /// Most headers allowed.
        limit: usize,
    },
    /// `Content-Length` is not a number, or there are two with different values.
    #[error("Content-Length is `{0}`: it must be one decimal number")]
    BadContentLength(String),
    /// The body has a transfer encoding, such as chunks.
    #[error("Transfer-Encoding is `{0}`; only bodies with Content-Length can be read")]
    TransferEncoding(String),
}

/// A complete response head.
#[derive(Debug)]
pub struct ResponseHead<'a> {
    /// The status code.
    pub status: u16,
    /// Length of the head in the buffer, in bytes.
    pub len: usize,
    headers: &'a [httparse::Header<'a>],
}

impl<'a> ResponseHead<'a> {
    /// Returns the head at the start of `input`, or `None` until it is complete.
    ///
    /// The headers are stored in `headers`; its length is their limit. The length of a head has no
    /// limit here: the caller bounds its buffer.
    pub fn parse(
        input: &'a [u8],
        headers: &'a mut [httparse::Header<'a>],
    ) -> Result<Option<ResponseHead<'a>>, ResponseError> {
        let limit = headers.len();
        let mut response = httparse::Response::new(headers);
        let len = match response.parse(input) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(ResponseError::TooManyHeaders { limit }),
            Err(error) => return Err(ResponseError::Malformed(error)),
        };
        let status = response.code.unwrap_or_default();
        Ok(Some(ResponseHead { status, len, headers: response.headers }))
    }

    /// Names and values of the headers, in order, without surrounding whitespace.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.headers.iter().map(|header| (header.name, header.value.trim_ascii()))
    }

    /// Length of the body in bytes (RFC 9112, 6.3): 0 for 1xx, 204 and 304, and without
    /// `Content-Length`.
    pub fn body_len(&self) -> Result<u64, ResponseError> {
        let mut body_len = None;
        for (name, value) in self.headers() {
            let text = || String::from_utf8_lossy(value).into_owned();
            if name.eq_ignore_ascii_case("Content-Length") {
                let len = decimal(value).filter(|len| body_len.is_none_or(|before| before == *len));
                body_len = Some(len.ok_or_else(|| ResponseError::BadContentLength(text()))?);
            } else if name.eq_ignore_ascii_case("Transfer-Encoding") {
                return Err(ResponseError::TransferEncoding(text()));
            }
        }
        let has_body = !matches!(self.status, 100..200 | 204 | 304);
        Ok(if has_body { body_len.unwrap_or(0) } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NO_HEADER;

    /// Status, length of the head and length of the body of `text`.
    fn parse(text: &str) -> Result<Option<(u16, usize, u64)>, ResponseError> {
        let mut headers = [NO_HEADER; 4];
        let Some(head) = ResponseHead::parse(text.as_bytes(), &mut headers)? else { return Ok(None) };
        Ok(Some((head.status, head.len, head.body_len()?)))
    }

    #[test]
    fn head_is_complete_with_its_empty_line() {
        let text = "HTTP/1.1 400 \r\nServer: x\r\nContent-Length: 3\r\n\r\n";
        for cut in 0..text.len() {
            assert_eq!(parse(&text[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(parse(&format!("{text}abc")), Ok(Some((400, text.len(), 3))));
    }

    #[test]
    fn statuses_without_a_body_have_none_whatever_the_length_says() {
        for (status, expected) in [(100, 0), (200, 7), (204, 0), (304, 0), (413, 7)] {
            let text = format!("HTTP/1.1 {status} x\r\nContent-Length: 7\r\n\r\n");
            assert_eq!(parse(&text).unwrap().unwrap().2, expected, "{status}");
        }
    }

    #[test]
    fn body_whose_length_is_uncertain_is_refused() {
        let with = |line: &str| parse(&format!("HTTP/1.1 200 \r\n{line}\r\n\r\n")).unwrap_err();
        assert_eq!(with("Content-Length: -1"), ResponseError::BadContentLength("-1".into()));
        let twice = with("Content-Length: 1\r\nContent-Length: 2");
        assert_eq!(twice, ResponseError::BadContentLength("2".into()));
        assert_eq!(with("Transfer-Encoding: chunked"), ResponseError::TransferEncoding("chunked".into()));
    }

    #[test]
    fn bytes_that_are_no_response_are_refused() {
        assert!(matches!(parse("nonsense\r\n\r\n"), Err(ResponseError::Malformed(_))));
        let five = "HTTP/1.1 200 \r\na: b\r\na: b\r\na: b\r\na: b\r\na: b\r\n\r\n";
        assert_eq!(parse(five), Err(ResponseError::TooManyHeaders { limit: 4 }));
    }
}
