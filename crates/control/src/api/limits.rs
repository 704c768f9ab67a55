//! [`Limits`]: the bounds of what clients of the API may use.

/// The bounds of what clients may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most connections at a time. One more is answered with status 503 and closed.
    pub max_connections: usize,
    /// Most bytes of one request's body.
    pub max_payload: usize,
    /// Most bytes of one request's first line and headers together.
    pub max_head: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_connections: 10, max_payload: 51200, max_head: 8192 }
    }
}
