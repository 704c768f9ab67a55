//! The service of one microVM: responds to requests, independent of the interface.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use config::{MmdsConfig, MmdsVersion};
use vesta_http::{Response, decimal};

use crate::http::response::{found, text};
use crate::http::{Method, Request, TtlHeader};
use crate::stats::Stats;
use crate::store::{Format, ReadError, Store, StoreError, segments};
use crate::token::{MAX_TTL_SECONDS, MIN_TTL_SECONDS, Tokens};

/// A store that the main thread and the interfaces of the guest share.
///
/// Only these methods and [`Service`] take its lock: the main thread for one change, the worker of
/// a device for one response. The limit of the store bounds how long they hold it.
#[derive(Debug, Clone)]
pub struct SharedStore(Arc<Mutex<Store>>);

impl SharedStore {
    /// An empty store for at most `limit` bytes of JSON.
    pub fn new(limit: usize) -> SharedStore {
        SharedStore(Arc::new(Mutex::new(Store::new(limit))))
    }

    /// Returns an independent store with the same limit and contents.
    #[must_use]
    pub fn deep_clone(&self) -> SharedStore {
        SharedStore(Arc::new(Mutex::new(self.lock().clone())))
    }

    /// See [`Store::get`].
    pub fn get(&self) -> serde_json::Value {
        self.lock().get()
    }

    /// See [`Store::put`].
    pub fn put(&self, contents: serde_json::Value) -> Result<(), StoreError> {
        self.lock().put(contents)
    }

    /// See [`Store::patch`].
    pub fn patch(&self, patch: serde_json::Value) -> Result<(), StoreError> {
        self.lock().patch(patch)
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

/// The metadata service of one microVM, shared by its interfaces.
#[derive(Debug)]
pub struct Service {
    config: MmdsConfig,
    store: SharedStore,
    tokens: Tokens,
    stats: Stats,
    /// Number of seeds returned by [`Service::new_seed`].
    seeds: AtomicU64,
}

impl Service {
    /// A service with the checked `config`. `key` is random and used for nothing else. A restored
    /// or forked microVM gets a new key, which invalidates all tokens.
    pub fn new(config: MmdsConfig, store: SharedStore, vm_id: &str, key: &[u8; 32]) -> Arc<Service> {
        let tokens = Tokens::new(key, vm_id);
        Arc::new(Service { config, store, tokens, stats: Stats::default(), seeds: AtomicU64::new(0) })
    }

    /// A new unpredictable number, for the TCP sequence numbers of one interface.
    pub(crate) fn new_seed(&self) -> u64 {
        self.tokens.derive_secret(self.seeds.fetch_add(1, Ordering::Relaxed))
    }

    /// Configuration of the service: all that a snapshot has of it.
    pub fn config(&self) -> &MmdsConfig {
        &self.config
    }

    /// Counters of the service.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Responds to a request at the time `now`.
    pub(crate) fn respond(&self, request: &Request, now: Duration) -> Response {
        match request.method {
            Method::Get => self.get(request, now),
            Method::Put => self.put(request, now),
            Method::NotAllowed => {
                let header = Some(("Allow", "GET, PUT".to_owned()));
                Response { header, ..text(405, "Not allowed HTTP method.") }
            }
            Method::Head | Method::Other => text(501, "Unsupported HTTP method."),
        }
    }

    fn get(&self, request: &Request, now: Duration) -> Response {
        if let Err(refusal) = self.check_token(request, now) {
            return refusal;
        }
        let format = if self.config.imds_compat { Format::Text } else { request.format };
        match self.store.lock().read(&request.path, format) {
            // As Firecracker, also if `imds_compat` decides that the body is text.
            Ok(body) => found(body, content_type(request.format)),
            Err(ReadError::Missing) => not_found(request),
            Err(ReadError::NoTextFormat) => {
                text(501, "Cannot retrieve value. The value has an unsupported type.")
            }
        }
    }

    /// Checks the token of a request. Version 2 requires one. Version 1 counts a missing or invalid
    /// token and accepts the request.
    fn check_token(&self, request: &Request, now: Duration) -> Result<(), Response> {
        let refusal = match &request.token {
            Some(token) if self.tokens.is_valid(token, now) => return Ok(()),
            Some(_) => {
                self.stats.rx_invalid_token.add(1);
                "MMDS token not valid."
            }
            None => {
                self.stats.rx_no_token.add(1);
                "No MMDS token provided. Show one in the header X-metadata-token or X-aws-ec2-metadata-token."
            }
        };
        match self.config.version {
            MmdsVersion::V1 => Ok(()),
            MmdsVersion::V2 => Err(text(401, refusal)),
        }
    }

    fn put(&self, request: &Request, now: Duration) -> Response {
        if !segments(&request.path).eq(["latest", "api", "token"]) {
            return not_found(request);
        }
        // The token for a forwarded request would leave the guest.
        if request.is_forwarded {
            return text(400, "Invalid header. Reason: X-Forwarded-For is not allowed here.");
        }
        let Some((header, value)) = &request.ttl else {
            let name = TtlHeader::Mmds.name();
            return text(400, &format!("Token time to live value not found. Give it in the header {name}."));
        };
        let bounds = MIN_TTL_SECONDS..=MAX_TTL_SECONDS;
        let ttl = decimal(value).and_then(|ttl| u32::try_from(ttl).ok()).filter(|ttl| bounds.contains(ttl));
        let Some(ttl) = ttl else {
            let given = String::from_utf8_lossy(value);
            let bounds = format!("between {MIN_TTL_SECONDS} and {MAX_TTL_SECONDS} seconds");
            return text(400, &format!("Invalid time to live value: {given}. It must be {bounds}."));
        };
        let token = found(self.tokens.issue(ttl, now), content_type(Format::Text));
        Response { header: Some((header.name(), ttl.to_string())), ..token }
    }
}

fn not_found(request: &Request) -> Response {
    text(404, &format!("Resource not found: {}.", request.path))
}

fn content_type(format: Format) -> &'static str {
    match format {
        Format::Json => "application/json",
        Format::Text => "text/plain",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use vesta_http::Version;

    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn service(version: MmdsVersion, imds_compat: bool) -> Arc<Service> {
        let store = SharedStore::new(51200);
        store.put(json!({"latest":{"meta-data":{"ami-id":"ami-1","cpus":4}}})).unwrap();
        let config =
            MmdsConfig { version, network_interfaces: vec!["eth0".into()], ipv4_address: None, imds_compat };
        Service::new(config, store, "vm", &[1; 32])
    }

    fn request(method: Method, path: &str) -> Request {
        Request {
            method,
            path: path.to_owned(),
            format: Format::Text,
            token: None,
            ttl: None,
            is_forwarded: false,
            keep_alive: true,
            version: Version::Http11,
            body_len: 0,
        }
    }

    fn token_request(ttl: &str) -> Request {
        let ttl = Some((TtlHeader::Ec2, ttl.as_bytes().to_vec()));
        Request { ttl, ..request(Method::Put, "/latest/api/token") }
    }

    fn get(path: &str, format: Format) -> Request {
        Request { format, ..request(Method::Get, path) }
    }

    fn body(response: &Response) -> &str {
        &response.content.as_ref().unwrap().1
    }

    fn header(response: &Response) -> Option<(&str, &str)> {
        response.header.as_ref().map(|(name, value)| (*name, value.as_str()))
    }

    fn outcome(response: &Response) -> (u16, &str) {
        (response.status, body(response))
    }

    #[test]
    fn accept_header_selects_the_format() {
        let service = service(MmdsVersion::V1, false);
        for (path, format, expected) in [
            ("/latest/meta-data", Format::Text, (200, "ami-id\ncpus")),
            ("/latest/meta-data/", Format::Json, (200, r#"{"ami-id":"ami-1","cpus":4}"#)),
            ("/latest/meta-data/ami-id", Format::Json, (200, r#""ami-1""#)),
            ("/latest/meta-data/cpus", Format::Json, (200, "4")),
            (
                "/latest/meta-data/cpus",
                Format::Text,
                (501, "Cannot retrieve value. The value has an unsupported type."),
            ),
            ("/latest/user-data", Format::Json, (404, "Resource not found: /latest/user-data.")),
        ] {
            assert_eq!(outcome(&service.respond(&get(path, format), NOW)), expected, "{path} {format:?}");
        }
    }

    #[test]
    fn imds_compat_always_responds_in_text() {
        let service = service(MmdsVersion::V1, true);
        for (format, media_type) in [(Format::Json, "application/json"), (Format::Text, "text/plain")] {
            let response = service.respond(&get("/latest", format), NOW);
            assert_eq!(outcome(&response), (200, "meta-data/"));
            assert_eq!(response.content.unwrap().0, media_type);
        }
    }

    #[test]
    fn version_2_requires_a_valid_token() {
        let service = service(MmdsVersion::V2, false);
        let status = |token: Option<&str>, now| {
            let head =
                Request { token: token.map(|t| t.as_bytes().to_vec()), ..get("/latest", Format::Text) };
            service.respond(&head, now).status
        };
        assert_eq!(status(None, NOW), 401);
        assert_eq!(status(Some("guess"), NOW), 401);
        let response = service.respond(&token_request("10"), NOW);
        assert_eq!(header(&response), Some(("X-aws-ec2-metadata-token-ttl-seconds", "10")));
        assert_eq!(status(Some(body(&response)), NOW + Duration::from_secs(9)), 200);
        assert_eq!(status(Some(body(&response)), NOW + Duration::from_secs(10)), 401);
        assert_eq!((service.stats().rx_no_token.get(), service.stats().rx_invalid_token.get()), (1, 2));
    }

    #[test]
    fn version_1_issues_tokens_and_requires_none() {
        let service = service(MmdsVersion::V1, false);
        assert_eq!(service.respond(&token_request("10"), NOW).status, 200);
        let head = Request { token: Some(b"guess".to_vec()), ..get("/latest", Format::Text) };
        assert_eq!(service.respond(&head, NOW).status, 200);
        assert_eq!(service.stats().rx_invalid_token.get(), 1);
    }

    #[test]
    fn token_request_needs_a_ttl_and_no_proxy() {
        let service = service(MmdsVersion::V2, false);
        for ttl in ["1", "21600"] {
            assert_eq!(service.respond(&token_request(ttl), NOW).status, 200, "{ttl}");
        }
        for ttl in ["0", "21601", "-1", "", "1.5", "99999999999999999999", "+5"] {
            assert_eq!(service.respond(&token_request(ttl), NOW).status, 400, "{ttl}");
        }
        let without = Request { ttl: None, ..token_request("1") };
        assert_eq!(service.respond(&without, NOW).status, 400);
        let forwarded = Request { is_forwarded: true, ..token_request("1") };
        assert_eq!(service.respond(&forwarded, NOW).status, 400);
        let elsewhere = Request { path: "/latest/api".into(), ..token_request("1") };
        assert_eq!(service.respond(&elsewhere, NOW).status, 404);
    }

    #[test]
    fn other_methods_are_not_allowed_or_not_supported() {
        let service = service(MmdsVersion::V1, false);
        let response = service.respond(&request(Method::NotAllowed, "/latest"), NOW);
        assert_eq!((response.status, header(&response)), (405, Some(("Allow", "GET, PUT"))));
        for method in [Method::Head, Method::Other] {
            let response = service.respond(&request(method, "/latest"), NOW);
            assert_eq!((response.status, header(&response)), (501, None));
        }
    }
}
