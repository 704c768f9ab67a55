//! `/network-interfaces/{id}`: network devices.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::vm_config::null_is_default;
use crate::{ConfigError, RateLimiter, in_range};

/// Longest `iface_id` in bytes.
pub const MAX_IFACE_ID_LEN: usize = 64;
/// Longest name of a tap in bytes (the kernel's `IFNAMSIZ`, less its final zero).
pub const MAX_TAP_NAME_LEN: usize = 15;
/// Smallest `mtu`.
pub const MIN_MTU: u16 = 68;
/// Most pairs of queues of one interface.
pub const MAX_QUEUE_PAIRS: u16 = 32;
/// Smallest queue of an interface, in descriptors.
pub const MIN_NET_QUEUE_SIZE: u16 = 64;
/// Largest queue of an interface, in descriptors.
pub const MAX_NET_QUEUE_SIZE: u16 = 1024;
/// The queue size where none is given.
pub const DEFAULT_NET_QUEUE_SIZE: u16 = 256;

/// A network device.
///
/// `backend`, `fds`, `socket`, `num_queues`, `io_threads` and `queue_size` are extensions; Firecracker has the other fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name: 1 to [`MAX_IFACE_ID_LEN`] visible ASCII characters (in a request's path, only letters, digits and `_` can stand).
    pub iface_id: String,
    /// The tap: its name, or the path of a macvtap's device (`/dev/tapN`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// The guest's address; the guest chooses one where absent. Frames that come from another are dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddress>,
    /// The MTU that the guest is told, at least [`MIN_MTU`]; it has its own way where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives; none where absent.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends; none where absent.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Who moves the frames; [`NetBackendKind::Tap`] where absent.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "is_tap")]
    pub backend: NetBackendKind,
    /// Descriptors of a tap that the monitor inherits, one for each pair of queues, in place of `host_dev_name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
    /// The socket of `passt`, with the back end of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Pairs of queues, 1 to [`MAX_QUEUE_PAIRS`]; 1 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Number of I/O threads that the pairs are spread over, 1 to `num_queues`; 1 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_threads: Option<u16>,
    /// Descriptors per queue: a power of two from [`MIN_NET_QUEUE_SIZE`] to [`MAX_NET_QUEUE_SIZE`]; [`DEFAULT_NET_QUEUE_SIZE`] where
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
}

/// Who moves an interface's frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// The address of a network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

/// A text that is no address of one card.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no MAC address: it must be six bytes in hex with colons in between, and neither of a group nor all zero"
)]
pub struct MacAddressError {
    /// What was given.
    text: String,
}

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, MacAddressError> {
        let error = || MacAddressError { text: text.chars().take(64).collect() };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(error());
        }
        Ok(MacAddress(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if at == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A network interface that has the right form and cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// An `iface_id` that is empty, too long, or has blanks, control or non-ASCII characters.
    #[error("iface_id {iface_id:?}: it must be 1 to {MAX_IFACE_ID_LEN} visible ASCII characters")]
    Id {
        /// What was given.
        iface_id: String,
    },
    /// The body speaks of another interface than the path of the request.
    #[error("iface_id is {body:?} and the request is for {path:?}")]
    OtherId {
        /// The id in the body.
        body: String,
        /// The id in the path, or of the interface that is to be changed.
        path: String,
    },
    /// A field that the back end needs is not there.
    #[error("network interface {iface_id} has no {field}, which the back end {backend} needs")]
    Missing {
        /// Which interface.
        iface_id: String,
        /// The field's name in JSON.
        field: &'static str,
        /// The back end's name in JSON.
        backend: &'static str,
    },
    /// A field that has no meaning with the back end.
    #[error("network interface {iface_id}: {field} cannot be had with {with}")]
    Conflict {
        /// Which interface.
        iface_id: String,
        /// The field's name in JSON.
        field: &'static str,
        /// What it conflicts with.
        with: &'static str,
    },
    /// A name that no tap can have.
    #[error(
        "host_dev_name {name:?}: it must be a tap's name of 1 to {MAX_TAP_NAME_LEN} visible ASCII characters without /, % and :, or a path that begins with /"
    )]
    TapName {
        /// What was given.
        name: String,
    },
    /// Descriptors that are not one for each pair of queues.
    #[error(
        "network interface {iface_id} has {count} fds and {pairs} pairs of queues: there must be one for each"
    )]
    DescriptorCount {
        /// Which interface.
        iface_id: String,
        /// How many descriptors.
        count: usize,
        /// How many pairs.
        pairs: u16,
    },
    /// A queue size that is no power of two.
    #[error("queue_size is {queue_size}: it must be a power of two")]
    QueueSize {
        /// What was given.
        queue_size: u16,
    },
    /// A path that the kernel cannot take.
    #[error("network interface {iface_id}: socket is empty or has a NUL byte")]
    BadPath {
        /// Which interface.
        iface_id: String,
    },
    /// An override of an interface that is not there.
    #[error("network_overrides: the microVM has no network interface {iface_id}")]
    Unknown {
        /// What was given.
        iface_id: String,
    },
    /// Two interfaces with something that can be there once only.
    #[error("network interfaces {first} and {second} have the same {what}, {value}")]
    Twice {
        /// The interface that has it.
        first: String,
        /// The interface that wants it, too.
        second: String,
        /// What they share.
        what: &'static str,
        /// Its value.
        value: String,
    },
}

impl NetworkInterface {
    /// Checks bounds and combinations.
    pub fn check(&self) -> Result<(), ConfigError> {
        let iface_id = || self.iface_id.clone();
        let well_formed = self.iface_id.bytes().all(|b| b.is_ascii_graphic());
        if !well_formed || self.iface_id.is_empty() || self.iface_id.len() > MAX_IFACE_ID_LEN {
            return Err(NetworkError::Id { iface_id: iface_id() }.into());
        }
        if let Some(mtu) = self.mtu {
            in_range("mtu", mtu.into(), MIN_MTU.into(), u16::MAX.into())?;
        }
        in_range("num_queues", self.num_queues().into(), 1, MAX_QUEUE_PAIRS.into())?;
        in_range("io_threads", self.io_threads().into(), 1, self.num_queues().into())?;
        let queue_size = self.queue_size();
        in_range("queue_size", queue_size.into(), MIN_NET_QUEUE_SIZE.into(), MAX_NET_QUEUE_SIZE.into())?;
        if !queue_size.is_power_of_two() {
            return Err(NetworkError::QueueSize { queue_size }.into());
        }
        self.check_backend()?;
        self.check_limits()
    }

    /// Checks that the fields that name a network go with the back end.
    fn check_backend(&self) -> Result<(), NetworkError> {
        let iface_id = || self.iface_id.clone();
        let conflict = |field, with| Err(NetworkError::Conflict { iface_id: iface_id(), field, with });
        let missing = |field, backend| Err(NetworkError::Missing { iface_id: iface_id(), field, backend });
        if self.backend == NetBackendKind::Passt {
            let Some(socket) = &self.socket else { return missing("socket", "passt") };
            let bytes = socket.as_os_str().as_encoded_bytes();
            if bytes.is_empty() || bytes.contains(&0) {
                return Err(NetworkError::BadPath { iface_id: iface_id() });
            }
            // A client of Firecracker's always gives a name: an empty one is none.
            if self.host_dev_name.as_ref().is_some_and(|name| !name.is_empty()) {
                return conflict("host_dev_name", "the back end passt");
            }
            if self.fds.is_some() {
                return conflict("fds", "the back end passt");
            }
            if self.num_queues() > 1 {
                return conflict("num_queues above 1", "the back end passt");
            }
            return Ok(());
        }
        if self.socket.is_some() {
            return conflict("socket", "a tap (the back end passt has one)");
        }
        match (&self.host_dev_name, &self.fds) {
            (None, None) => return missing("host_dev_name", "tap"),
            (Some(_), Some(_)) => return conflict("fds", "host_dev_name"),
            (Some(name), None) => check_tap_name(name)?,
            (None, Some(fds)) => {
                if fds.len() != usize::from(self.num_queues()) {
                    let (count, pairs) = (fds.len(), self.num_queues());
                    return Err(NetworkError::DescriptorCount { iface_id: iface_id(), count, pairs });
                }
            }
        }
        Ok(())
    }

    fn check_limits(&self) -> Result<(), ConfigError> {
        if self.backend == NetBackendKind::Vhost && self.is_limited() {
            let (field, with) = ("a rate limiter", "the back end vhost: the kernel moves the frames");
            return Err(NetworkError::Conflict { iface_id: self.iface_id.clone(), field, with }.into());
        }
        [self.rx_rate_limiter, self.tx_rate_limiter].iter().flatten().try_for_each(RateLimiter::check)
    }

    fn is_limited(&self) -> bool {
        let limiters = [self.rx_rate_limiter, self.tx_rate_limiter];
        let buckets = limiters.iter().flatten().flat_map(|limiter| [limiter.bandwidth, limiter.ops]);
        buckets.flatten().any(|bucket| !bucket.is_unlimited())
    }

    /// Whether it says where its network is. One of a fork's child may have none.
    pub fn names_a_network(&self) -> bool {
        let named = self.host_dev_name.as_ref().is_some_and(|name| !name.is_empty());
        named || self.fds.is_some() || self.socket.is_some()
    }

    /// Whether the same descriptors serve both.
    pub fn has_same_network(&self, other: &NetworkInterface) -> bool {
        let named = |network: &NetworkInterface| {
            (network.host_dev_name.clone(), network.fds.clone(), network.socket.clone())
        };
        self.backend == other.backend
            && self.num_queues() == other.num_queues()
            && named(self) == named(other)
    }

    /// Pairs of queues.
    pub fn num_queues(&self) -> u16 {
        self.num_queues.unwrap_or(1)
    }

    /// Number of I/O threads that the pairs are spread over.
    pub fn io_threads(&self) -> u16 {
        self.io_threads.unwrap_or(1)
    }

    /// Descriptors per queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(DEFAULT_NET_QUEUE_SIZE)
    }

    /// This interface with the limits of `update` in place of its own, checked. Only the buckets that `update` names are replaced.
    pub fn updated(&self, update: &NetworkInterfaceUpdate) -> Result<NetworkInterface, ConfigError> {
        if update.iface_id != self.iface_id {
            let (body, path) = (update.iface_id.clone(), self.iface_id.clone());
            return Err(NetworkError::OtherId { body, path }.into());
        }
        let merged = |old: Option<RateLimiter>, new: Option<RateLimiter>| match new {
            None => old,
            Some(new) => {
                let old = old.unwrap_or_default();
                Some(RateLimiter { bandwidth: new.bandwidth.or(old.bandwidth), ops: new.ops.or(old.ops) })
            }
        };
        let new = NetworkInterface {
            rx_rate_limiter: merged(self.rx_rate_limiter, update.rx_rate_limiter),
            tx_rate_limiter: merged(self.tx_rate_limiter, update.tx_rate_limiter),
            ..self.clone()
        };
        // Not the rest: what a fork's child has may lead nowhere.
        new.check_limits()?;
        Ok(new)
    }
}

fn check_tap_name(name: &str) -> Result<(), NetworkError> {
    let error = || NetworkError::TapName { name: name.chars().take(64).collect() };
    if name.starts_with('/') {
        return if name.contains('\0') { Err(error()) } else { Ok(()) };
    }
    // The kernel refuses `.`, `..`, `/` and `:`, and makes a name of its own where there is a `%`.
    let good = |b: u8| b.is_ascii_graphic() && !b"/%:".contains(&b);
    let fits = (1..=MAX_TAP_NAME_LEN).contains(&name.len()) && name != "." && name != "..";
    if fits && name.bytes().all(good) { Ok(()) } else { Err(error()) }
}

/// Checks each interface, and that they go together: no id, address, tap or descriptor twice.
pub fn check_networks(networks: &[NetworkInterface]) -> Result<(), ConfigError> {
    networks.iter().try_for_each(NetworkInterface::check)?;
    check_apart(networks)
}

fn check_apart(networks: &[NetworkInterface]) -> Result<(), ConfigError> {
    for (i, network) in networks.iter().enumerate() {
        for other in &networks[..i] {
            if let Some((what, value)) = shared(other, network) {
                let (first, second) = (other.iface_id.clone(), network.iface_id.clone());
                return Err(NetworkError::Twice { first, second, what, value }.into());
            }
        }
    }
    Ok(())
}

/// What two interfaces both have, and only one can.
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

/// The body of `PATCH /network-interfaces/{id}`: what is absent or null stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// Which interface.
    pub iface_id: String,
    /// New limits on what the guest receives; a bucket that is absent stays as it is, one of no size is switched off.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// New limits on what the guest sends, likewise.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// An interface whose network is another one now: after a snapshot, or in a fork's child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Which interface.
    pub iface_id: String,
    /// Its tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// Or the descriptors of its tap (an extension).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
    /// Or the socket of its `passt` (an extension), where it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The guest's address from now on (an extension); the one that it had where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddress>,
}

impl NetworkInterface {
    /// Without a network: what it had is another guest's.
    pub fn unplug(&mut self) {
        (self.host_dev_name, self.fds, self.socket) = (None, None, None);
    }
}

/// Puts overrides in the place of what `networks` had, and checks that they go together. What no override names may have no network.
pub fn override_networks(
    networks: &mut [NetworkInterface],
    overrides: &[NetworkOverride],
) -> Result<(), ConfigError> {
    for NetworkOverride { iface_id, host_dev_name, fds, socket, guest_mac } in overrides {
        let network = networks.iter_mut().find(|network| network.iface_id == *iface_id);
        let network = network.ok_or_else(|| NetworkError::Unknown { iface_id: iface_id.clone() })?;
        (network.host_dev_name, network.fds, network.socket) =
            (host_dev_name.clone(), fds.clone(), socket.clone());
        network.guest_mac = guest_mac.or(network.guest_mac);
        network.check()?;
    }
    for network in networks.iter().filter(|network| network.names_a_network()) {
        network.check()?;
    }
    check_apart(networks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn a_minimal_interface_has_firecrackers_defaults() {
        let network = with(r#""host_dev_name":"tap0""#).unwrap();
        assert_eq!((network.num_queues(), network.io_threads(), network.queue_size()), (1, 1, 256));
        assert_eq!(
            serde_json::to_string(&network).unwrap(),
            r#"{"iface_id":"eth0","host_dev_name":"tap0","rx_rate_limiter":null,"tx_rate_limiter":null}"#
        );
    }

    #[test]
    fn clients_may_send_null_and_empty_limiters() {
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
    fn what_cannot_be_meant_is_refused_by_name() {
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
            (r#""fds":[3],"num_queues":2"#, "1 fds and 2 pairs"),
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
    fn interfaces_that_share_what_only_one_can_have_are_named() {
        let check = |a: &str, b: &str| {
            let parse = |json: &str| serde_json::from_str::<NetworkInterface>(json).unwrap();
            check_networks(&[parse(a), parse(b)]).map_err(|error| error.to_string())
        };
        let a = r#"{"iface_id":"a","host_dev_name":"t0","guest_mac":"06:00:ac:10:00:02"}"#;
        assert_eq!(check(a, r#"{"iface_id":"b","host_dev_name":"t1"}"#), Ok(()));
        for (b, named) in [
            (r#"{"iface_id":"a","host_dev_name":"t1"}"#, "iface_id, a"),
            (r#"{"iface_id":"b","host_dev_name":"t0"}"#, "host_dev_name, t0"),
            (
                r#"{"iface_id":"b","host_dev_name":"t1","guest_mac":"06:00:AC:10:00:02"}"#,
                "guest_mac, 06:00:ac:10:00:02",
            ),
        ] {
            let error = check(a, b).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        let fds = |id: &str| format!(r#"{{"iface_id":"{id}","fds":[7]}}"#);
        assert!(check(&fds("a"), &fds("b")).unwrap_err().contains("descriptor, 7"));
    }

    #[test]
    fn an_update_replaces_the_buckets_that_it_names() {
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

    #[test]
    fn overrides_take_the_place_of_networks_and_leave_the_rest_as_it_was() {
        let parse = |json: &str| serde_json::from_str::<NetworkInterface>(json).unwrap();
        let before = [
            parse(r#"{"iface_id":"a","host_dev_name":"t0","guest_mac":"06:00:ac:10:00:02","mtu":1400}"#),
            parse(r#"{"iface_id":"b","host_dev_name":"t1","guest_mac":"06:00:ac:10:00:03"}"#),
        ];
        let over = |json: &str| {
            let mut networks = before.clone();
            networks[1].unplug();
            let overrides: Vec<NetworkOverride> = serde_json::from_str(json).unwrap();
            override_networks(&mut networks, &overrides).map_err(|e| e.to_string()).map(|()| networks)
        };
        let [a, b] = over(r#"[{"iface_id":"a","fds":[7],"guest_mac":"06:00:ac:10:00:09"}]"#).unwrap();
        assert_eq!((a.host_dev_name, a.fds, a.mtu), (None, Some(vec![7]), Some(1400)));
        assert_eq!(a.guest_mac.unwrap().to_string(), "06:00:ac:10:00:09");
        assert!(!b.names_a_network() && b.guest_mac == before[1].guest_mac);
        let update = NetworkInterfaceUpdate {
            iface_id: "b".into(),
            rx_rate_limiter: Some(RateLimiter::default()),
            tx_rate_limiter: None,
        };
        b.updated(&update).unwrap();
        for (json, named) in [
            (r#"[{"iface_id":"c","host_dev_name":"t2"}]"#, "interface c"),
            (r#"[{"iface_id":"b"}]"#, "host_dev_name"),
            (r#"[{"iface_id":"b","socket":"/s"}]"#, "socket"),
            (r#"[{"iface_id":"b","host_dev_name":"t0"}]"#, "host_dev_name, t0"),
            (r#"[{"iface_id":"b","host_dev_name":"t2","guest_mac":"06:00:ac:10:00:02"}]"#, "guest_mac"),
        ] {
            let error = over(json).unwrap_err();
            assert!(error.contains(named), "{json}: {error}");
        }
    }

    proptest! {
        #[test]
        fn addresses_come_back_the_same(mut bytes: [u8; 6]) {
            bytes[0] = bytes[0] & 0xfe | 2;
            let mac = MacAddress(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            prop_assert_eq!(mac.to_string().to_uppercase().parse(), Ok(mac));
        }

        #[test]
        fn no_text_makes_an_address_panic(text in "\\PC*") {
            let _ = text.parse::<MacAddress>();
        }
    }
}
