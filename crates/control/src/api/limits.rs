//! [`Limits`]: the bounds of what clients of the API may use.

use std::time::Duration;

/// The bounds of what clients may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most connections at a time. One more is answered with status 503 and closed.
    pub max_connections: usize,
    /// Most connections of those that are streams of events. One more is answered with status 503.
    pub max_streams: usize,
    /// How often a stream without events gets a comment, so that a client that is gone is noticed.
    pub stream_comment_interval: Duration,
    /// Most bytes of one request's body.
    pub max_payload: usize,
    /// Most bytes of one request's first line and headers together.
    pub max_head: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_connections: 10,
            max_streams: 4,
            stream_comment_interval: Duration::from_secs(20),
            max_payload: 51200,
            max_head: 8192,
        }
    }
}
