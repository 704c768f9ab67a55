//! `/network-interfaces/{id}`: network devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks;
use crate::error::{ConfigError, NetworkError};
use crate::limits::{MAX_IFACE_ID_LEN, MAX_TAP_NAME_LEN, MIN_MTU};
#[cfg(any(doc, feature = "schema"))]
use crate::limits::{MAX_NET_QUEUE_SIZE, MAX_QUEUE_PAIRS, MIN_NET_QUEUE_SIZE};
use crate::mac::MacAddress;
use crate::queues::{DEFAULT_IO_THREADS, DEFAULT_NUM_QUEUES, QueueBounds, QueueConfig};
use crate::serde_helpers::null_is_default;
use crate::token_bucket::RateLimiter;

/// Default `queue_size` of a network interface.
pub const DEFAULT_NET_QUEUE_SIZE: u16 = 256;

/// A network device.
///
/// `backend`, `fds`, `socket`, `num_queues`, `io_threads` and `queue_size` are extensions.
/// Firecracker has the other fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Id: 1 to [`MAX_IFACE_ID_LEN`] visible ASCII characters. The path of an API request can hold
    /// only letters, digits and `_`.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_IFACE_ID_LEN), regex(pattern = crate::schema::VISIBLE)))]
    pub iface_id: String,
    /// Tap: its name, or the path of a macvtap device (`/dev/tapN`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::tap_name())))]
    pub host_dev_name: Option<String>,
    /// MAC address of the guest; the guest chooses one if absent. Frames from another address are
    /// dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddress>,
    /// MTU that the device offers to the guest, at least [`MIN_MTU`]; none is offered if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = MIN_MTU, max = u16::MAX)))]
    pub mtu: Option<u16>,
    /// Limits on frames to the guest; none if absent.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on frames from the guest; none if absent.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// What moves the frames; `tap` if absent.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "is_tap")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<NetBackendKind>", extend("default" = NetBackendKind::default()), extend("x-vesta-extension" = true)))]
    pub backend: NetBackendKind,
    /// Descriptors of a tap that the monitor inherits, one for each queue pair; instead of
    /// `host_dev_name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub fds: Option<Vec<i32>>,
    /// Unix socket of `passt`, for the backend of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH), extend("x-vesta-extension" = true)))]
    pub socket: Option<PathBuf>,
    /// Number of queue pairs, 1 to [`MAX_QUEUE_PAIRS`]; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_QUEUE_PAIRS), extend("default" = DEFAULT_NUM_QUEUES), extend("x-vesta-extension" = true)))]
    pub num_queues: Option<u16>,
    /// Number of I/O threads that share the queue pairs, 1 to `num_queues`; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_QUEUE_PAIRS), extend("default" = DEFAULT_IO_THREADS), extend("x-vesta-extension" = true)))]
    pub io_threads: Option<u16>,
    /// Descriptors per queue: a power of two from [`MIN_NET_QUEUE_SIZE`] to [`MAX_NET_QUEUE_SIZE`];
    /// [`DEFAULT_NET_QUEUE_SIZE`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = MIN_NET_QUEUE_SIZE, max = MAX_NET_QUEUE_SIZE), extend("default" = DEFAULT_NET_QUEUE_SIZE), extend("x-vesta-extension" = true)))]
    pub queue_size: Option<u16>,
}

/// Backend of a network interface: what moves the frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum NetBackendKind {
    /// The monitor, between a tap and the guest.
    #[default]
    Tap,
    /// The kernel's vhost-net, between a tap and the guest.
    Vhost,
    /// The monitor, between a `passt` process and the guest.
    Passt,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_tap(kind: &NetBackendKind) -> bool {
    *kind == NetBackendKind::Tap
}

impl NetworkInterface {
    /// An interface on the tap `host_dev_name`, with all defaults.
    pub fn new(iface_id: impl Into<String>, host_dev_name: impl Into<String>) -> NetworkInterface {
        NetworkInterface {
            iface_id: iface_id.into(),
            host_dev_name: Some(host_dev_name.into()),
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            backend: NetBackendKind::default(),
            fds: None,
            socket: None,
            num_queues: None,
            io_threads: None,
            queue_size: None,
        }
    }

    /// Checks bounds and combinations.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !checks::is_device_id(&self.iface_id, MAX_IFACE_ID_LEN) {
            return Err(NetworkError::Id { iface_id: self.iface_id.clone() }.into());
        }
        self.check_fields().map_err(|error| error.in_network(&self.iface_id))
    }

    fn check_fields(&self) -> Result<(), ConfigError> {
        if let Some(mtu) = self.mtu {
            checks::in_range("mtu", mtu.into(), MIN_MTU.into(), u16::MAX.into())?;
        }
        self.queues().check(QueueBounds::NETWORK)?;
        match self.backend {
            NetBackendKind::Tap | NetBackendKind::Vhost => self.check_tap()?,
            NetBackendKind::Passt => self.check_passt()?,
        }
        self.check_limits()
    }

    /// Checks the fields that the backends with a tap need or exclude.
    fn check_tap(&self) -> Result<(), NetworkError> {
        if self.socket.is_some() {
            return conflict("socket", "a tap: only the backend passt has one");
        }
        match (&self.host_dev_name, &self.fds) {
            (None, None) => Err(NetworkError::MissingField { field: "host_dev_name", backend: "tap" }),
            (Some(_), Some(_)) => conflict("fds", "host_dev_name"),
            (Some(name), None) => check_tap_name(name),
            (None, Some(fds)) if fds.len() != usize::from(self.num_queues()) => {
                Err(NetworkError::DescriptorCount { count: fds.len(), pairs: self.num_queues() })
            }
            (None, Some(_)) => Ok(()),
        }
    }

    /// Checks the fields that the backend passt needs or excludes.
    fn check_passt(&self) -> Result<(), ConfigError> {
        let Some(socket) = &self.socket else {
            return Err(NetworkError::MissingField { field: "socket", backend: "passt" }.into());
        };
        checks::path("socket", socket)?;
        // Clients of Firecracker always send a name. An empty one counts as absent.
        if self.host_dev_name.as_ref().is_some_and(|name| !name.is_empty()) {
            conflict("host_dev_name", "the backend passt")?;
        }
        if self.fds.is_some() {
            conflict("fds", "the backend passt")?;
        }
        if self.num_queues() > 1 {
            conflict("num_queues above 1", "the backend passt")?;
        }
        Ok(())
    }

    fn check_limits(&self) -> Result<(), ConfigError> {
        if self.backend == NetBackendKind::Vhost && self.is_limited() {
            conflict("a rate limiter", "the backend vhost: the kernel moves the frames")?;
        }
        [self.rx_rate_limiter, self.tx_rate_limiter].iter().flatten().try_for_each(RateLimiter::check)
    }

    fn is_limited(&self) -> bool {
        let limiters = [self.rx_rate_limiter, self.tx_rate_limiter];
        let buckets = limiters.iter().flatten().flat_map(|limiter| [limiter.bandwidth, limiter.ops]);
        buckets.flatten().any(|bucket| !bucket.is_unlimited())
    }

    /// Whether a tap or socket of the host is given. An interface of a fork's child may have none.
    pub fn has_host_endpoint(&self) -> bool {
        let has_name = self.host_dev_name.as_ref().is_some_and(|name| !name.is_empty());
        has_name || self.fds.is_some() || self.socket.is_some()
    }

    /// Whether the open backend of `other` fits this interface too.
    pub fn has_same_host_endpoint(&self, other: &NetworkInterface) -> bool {
        self.backend == other.backend
            && self.num_queues() == other.num_queues()
            && self.host_dev_name == other.host_dev_name
            && self.fds == other.fds
            && self.socket == other.socket
    }

    /// Removes tap and socket: those of another guest.
    pub fn clear_host_endpoint(&mut self) {
        (self.host_dev_name, self.fds, self.socket) = (None, None, None);
    }

    /// The queue pairs, with defaults.
    pub fn queues(&self) -> QueueConfig {
        let (num_queues, io_threads) = (self.num_queues(), self.io_threads());
        QueueConfig { num_queues, io_threads, queue_size: self.queue_size() }
    }

    /// Number of queue pairs.
    pub fn num_queues(&self) -> u16 {
        self.num_queues.unwrap_or(DEFAULT_NUM_QUEUES)
    }

    /// Number of I/O threads that share the queue pairs.
    pub fn io_threads(&self) -> u16 {
        self.io_threads.unwrap_or(DEFAULT_IO_THREADS)
    }

    /// Descriptors per queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(DEFAULT_NET_QUEUE_SIZE)
    }

    /// Returns this interface with the rate limits of `update`, checked. Only the buckets in
    /// `update` are replaced.
    pub fn updated(&self, update: &NetworkInterfaceUpdate) -> Result<NetworkInterface, ConfigError> {
        if update.iface_id != self.iface_id {
            let (body, path) = (update.iface_id.clone(), self.iface_id.clone());
            return Err(NetworkError::IdMismatch { body, path }.into());
        }
        // Before the buckets that limit nothing are removed.
        let limits = [update.rx_rate_limiter, update.tx_rate_limiter];
        let checked = limits.iter().flatten().try_for_each(RateLimiter::check);
        checked.map_err(|error| error.in_network(&self.iface_id))?;
        let new = NetworkInterface {
            rx_rate_limiter: RateLimiter::updated(self.rx_rate_limiter, update.rx_rate_limiter),
            tx_rate_limiter: RateLimiter::updated(self.tx_rate_limiter, update.tx_rate_limiter),
            ..self.clone()
        };
        // Only the limits: an interface of a fork's child may have no tap.
        new.check_limits().map_err(|error| error.in_network(&self.iface_id))?;
        Ok(new)
    }
}

fn conflict(field: &'static str, with: &'static str) -> Result<(), NetworkError> {
    Err(NetworkError::Conflict { field, with })
}

fn check_tap_name(name: &str) -> Result<(), NetworkError> {
    let error = || NetworkError::TapName { name: name.chars().take(64).collect() };
    if name.starts_with('/') {
        return if name.contains('\0') { Err(error()) } else { Ok(()) };
    }
    // The kernel refuses `.`, `..`, `/` and `:`. It replaces `%d` by a number of its choice.
    let is_allowed = |b: u8| b.is_ascii_graphic() && !b"/%:".contains(&b);
    let fits = (1..=MAX_TAP_NAME_LEN).contains(&name.len()) && name != "." && name != "..";
    if fits && name.bytes().all(is_allowed) { Ok(()) } else { Err(error()) }
}

/// Checks each interface, and that no two share an id, a MAC address or a host endpoint.
pub fn check_networks(networks: &[NetworkInterface]) -> Result<(), ConfigError> {
    networks.iter().try_for_each(NetworkInterface::check)?;
    check_distinct(networks)
}

/// Checks that no two interfaces share an id, a MAC address or a host endpoint.
pub(crate) fn check_distinct(networks: &[NetworkInterface]) -> Result<(), ConfigError> {
    for (i, network) in networks.iter().enumerate() {
        for other in &networks[..i] {
            if let Some((what, value)) = shared(other, network) {
                let (first, second) = (other.iface_id.clone(), network.iface_id.clone());
                return Err(NetworkError::Duplicate { first, second, what, value }.into());
            }
        }
    }
    Ok(())
}

/// What two interfaces share and only one can have: its name and value.
fn shared(a: &NetworkInterface, b: &NetworkInterface) -> Option<(&'static str, String)> {
    if a.iface_id == b.iface_id {
        return Some(("iface_id", a.iface_id.clone()));
    }
    if let (Some(mac), true) = (a.guest_mac, a.guest_mac == b.guest_mac) {
        return Some(("guest_mac", mac.to_string()));
    }
    if let (Some(name), true) = (&a.host_dev_name, a.host_dev_name == b.host_dev_name)
        && !name.is_empty()
    {
        return Some(("host_dev_name", name.clone()));
    }
    if let (Some(socket), true) = (&a.socket, a.socket == b.socket) {
        return Some(("socket", socket.display().to_string()));
    }
    let fds = |network: &NetworkInterface| network.fds.clone().unwrap_or_default();
    let both = fds(a).into_iter().find(|fd| fds(b).contains(fd))?;
    Some(("descriptor", both.to_string()))
}

/// The body of `PATCH /network-interfaces/{id}`. A field that is absent or null changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// Id of the interface.
    pub iface_id: String,
    /// New limits on frames to the guest. An absent bucket is unchanged; one of size 0 is removed.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// New limits on frames from the guest, likewise.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<NetworkInterface, String> {
        let network: NetworkInterface = serde_json::from_str(json).map_err(|error| error.to_string())?;
        network.check().map_err(|error| error.to_string())?;
        Ok(network)
    }

    fn with(fields: &str) -> Result<NetworkInterface, String> {
        parse(&format!(r#"{{"iface_id":"eth0",{fields}}}"#))
    }

    fn refused(fields: &str) -> String {
        with(fields).unwrap_err()
    }

    #[test]
    fn minimal_interface_has_firecrackers_defaults() {
        let network = with(r#""host_dev_name":"tap0""#).unwrap();
        assert_eq!((network.num_queues(), network.io_threads(), network.queue_size()), (1, 1, 256));
        assert_eq!(
            serde_json::to_string(&network).unwrap(),
            r#"{"iface_id":"eth0","host_dev_name":"tap0","rx_rate_limiter":null,"tx_rate_limiter":null}"#
        );
    }

    #[test]
    fn null_and_empty_rate_limiters_are_accepted() {
        let network = with(
            r#""host_dev_name":"tap0","guest_mac":null,"mtu":null,"rx_rate_limiter":{},"tx_rate_limiter":{},"backend":null"#,
        )
        .unwrap();
        assert_eq!((network.guest_mac, network.rx_rate_limiter), (None, Some(RateLimiter::default())));
    }

    #[test]
    fn all_fields_are_read() {
        let network = with(
            r#""host_dev_name":"tap0","guest_mac":"06:00:AC:10:00:02","mtu":9000,"num_queues":4,"io_threads":2,"queue_size":512,
               "rx_rate_limiter":{"ops":{"size":1,"refill_time":100}},"tx_rate_limiter":{"bandwidth":{"size":1,"refill_time":100}}"#,
        )
        .unwrap();
        assert_eq!(network.guest_mac.unwrap().to_string(), "06:00:ac:10:00:02");
        assert_eq!(network.mtu, Some(9000));
        assert_eq!(with(r#""host_dev_name":"t","backend":"vhost""#).unwrap().backend, NetBackendKind::Vhost);
        assert_eq!(with(r#""backend":"passt","socket":"/s""#).unwrap().backend, NetBackendKind::Passt);
        assert_eq!(with(r#""fds":[5,6],"num_queues":2"#).unwrap().fds, Some(vec![5, 6]));
        with(r#""host_dev_name":"/dev/tap7""#).unwrap();
    }

    #[test]
    fn invalid_fields_are_named() {
        for (fields, named) in [
            (r#""guest_mac":null"#, "host_dev_name"),
            (r#""host_dev_name":"""#, "host_dev_name"),
            (r#""host_dev_name":"sixteen_chars_xx""#, "host_dev_name"),
            (r#""host_dev_name":"tap%d""#, "tap%d"),
            (r#""host_dev_name":"a/b""#, "a/b"),
            (r#""host_dev_name":"t","mtu":67"#, "mtu is 67"),
            (r#""host_dev_name":"t","mtu":65536"#, "65536"),
            (r#""host_dev_name":"t","guest_mac":"01:00:5e:00:00:01""#, "01:00:5e:00:00:01"),
            (r#""host_dev_name":"t","guest_mac":"6:0:ac:10:0:2""#, "6:0:ac:10:0:2"),
            (r#""host_dev_name":"t","guest_mac":"06:00:ac:10:00""#, "06:00:ac:10:00"),
            (r#""host_dev_name":"t","guest_mac":"+6:00:ac:10:00:02""#, "+6:00"),
            (r#""host_dev_name":"t","num_queues":0"#, "num_queues is 0"),
            (r#""host_dev_name":"t","io_threads":2"#, "io_threads is 2"),
            (r#""host_dev_name":"t","queue_size":100"#, "queue_size is 100"),
            (r#""host_dev_name":"t","queue_size":32"#, "between 64 and 1024"),
            (r#""host_dev_name":"t","socket":"/s""#, "socket"),
            (r#""host_dev_name":"t","fds":[3]"#, "fds"),
            (r#""fds":[3],"num_queues":2"#, "fds has 1 descriptors"),
            (r#""backend":"passt""#, "socket"),
            (r#""backend":"passt","socket":"""#, "socket"),
            (r#""backend":"passt","socket":"/s","host_dev_name":"t""#, "host_dev_name"),
            (r#""backend":"passt","socket":"/s","num_queues":2"#, "num_queues"),
            (r#""backend":"slirp","host_dev_name":"t""#, "slirp"),
            (r#""host_dev_name":"t","allow_mmds_requests":true"#, "allow_mmds_requests"),
            (
                r#""backend":"vhost","host_dev_name":"t","tx_rate_limiter":{"ops":{"size":1,"refill_time":1}}"#,
                "rate limiter",
            ),
        ] {
            let error = refused(fields);
            assert!(error.contains(named), "{fields}: {error}");
        }
        assert!(parse(r#"{"iface_id":"a b","host_dev_name":"t"}"#).unwrap_err().contains("a b"));
        with(r#""backend":"vhost","host_dev_name":"t","tx_rate_limiter":{}"#).unwrap();
    }

    #[test]
    fn shared_id_mac_tap_or_descriptor_is_refused() {
        let check = |a: &str, b: &str| {
            let parse = |json: &str| serde_json::from_str::<NetworkInterface>(json).unwrap();
            check_networks(&[parse(a), parse(b)]).map_err(|error| error.to_string())
        };
        let a = r#"{"iface_id":"a","host_dev_name":"t0","guest_mac":"06:00:ac:10:00:02"}"#;
        assert_eq!(check(a, r#"{"iface_id":"b","host_dev_name":"t1"}"#), Ok(()));
        for (b, named) in [
            (r#"{"iface_id":"a","host_dev_name":"t1"}"#, "iface_id: a"),
            (r#"{"iface_id":"b","host_dev_name":"t0"}"#, "host_dev_name: t0"),
            (
                r#"{"iface_id":"b","host_dev_name":"t1","guest_mac":"06:00:AC:10:00:02"}"#,
                "guest_mac: 06:00:ac:10:00:02",
            ),
        ] {
            let error = check(a, b).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        let fds = |id: &str| format!(r#"{{"iface_id":"{id}","fds":[7]}}"#);
        assert!(check(&fds("a"), &fds("b")).unwrap_err().contains("descriptor: 7"));
    }

    #[test]
    fn update_replaces_the_buckets_it_names() {
        let network = with(
            r#""host_dev_name":"t","rx_rate_limiter":{"ops":{"size":1,"refill_time":1}},"tx_rate_limiter":{"ops":{"size":2,"refill_time":1}}"#,
        )
        .unwrap();
        let update: NetworkInterfaceUpdate = serde_json::from_str(
            r#"{"iface_id":"eth0","rx_rate_limiter":{"bandwidth":{"size":5,"refill_time":1}},"tx_rate_limiter":null}"#,
        )
        .unwrap();
        let new = network.updated(&update).unwrap();
        let rx = new.rx_rate_limiter.unwrap();
        assert_eq!((rx.bandwidth.unwrap().size, rx.ops.unwrap().size), (5, 1));
        assert_eq!(new.tx_rate_limiter, network.tx_rate_limiter);
        let other = NetworkInterfaceUpdate { iface_id: "eth1".into(), ..update };
        assert!(network.updated(&other).unwrap_err().to_string().contains("eth1"));
    }
}
