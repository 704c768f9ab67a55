//! Requests of API clients, and why one is refused before the API routes it.

use vesta_http::HeadError;

/// Method of a request. The doc of each says what the API uses it for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Return a resource.
    Get,
    /// Create or replace a resource, or start an action.
    Put,
    /// Change parts of a resource.
    Patch,
    /// Remove a resource.
    Delete,
}

impl Method {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Method> {
        [Method::Get, Method::Put, Method::Patch, Method::Delete]
            .into_iter()
            .find(|method| method.name() == name)
    }
}

/// One whole request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The request target without scheme and host: `/path` for `http://host/path`.
    pub path: String,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
    /// The value of `Last-Event-ID`: the last event that a client of `GET /events` has.
    pub last_event_id: Option<String>,
}

/// A request that is refused before the API routes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong with the request.
    pub error: ProtocolError,
    /// Whether the connection stays open after the response. It closes only where it is uncertain
    /// where the next request starts.
    pub keep_alive: bool,
}

/// Why a request is not valid HTTP, or is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The request head is bad or too large.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// A method that no resource has.
    #[error("there is no {method} {path}: methods are GET, PUT, PATCH and DELETE")]
    UnknownMethod {
        /// The method given.
        method: String,
        /// The path given.
        path: String,
    },
    /// The body is larger than the limit. The text is Firecracker's: clients may match it.
    #[error("Request payload with size {size} is larger than the limit of {limit} allowed by server.")]
    PayloadTooLarge {
        /// The value of `Content-Length`.
        size: u64,
        /// Most bytes allowed.
        limit: usize,
    },
}
