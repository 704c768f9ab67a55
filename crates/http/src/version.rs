//! Versions of HTTP.

/// Version of the protocol. A response has the version of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0: one request per connection, unless the client sends `Connection: keep-alive`.
    Http10,
    /// HTTP/1.1: the connection stays open, unless the client sends `Connection: close`.
    Http11,
}

impl Version {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
        }
    }
}
