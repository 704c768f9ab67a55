//! Configuration and saved state of a network device.

use config::NetworkInterface;
use serde::{Deserialize, Serialize};

use virtio::device::DeviceData;
use virtio::rate_limiter::RateLimiterState;

/// Configuration of a network device, constant for its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Id of the interface.
    pub id: String,
    /// MAC address of the guest. None: the guest chooses one.
    pub mac: Option<[u8; 6]>,
    /// MTU that the device reports to the driver.
    pub mtu: Option<u16>,
    /// Number of queue pairs, 1 or more.
    pub pairs: u16,
    /// Descriptors in each queue: a power of two.
    pub queue_size: u16,
}

impl NetConfig {
    /// The configuration that `network`, which was validated, describes.
    pub fn of(network: &NetworkInterface) -> Self {
        NetConfig {
            id: network.iface_id.clone(),
            mac: network.guest_mac.map(|mac| mac.0),
            mtu: network.mtu,
            pairs: network.num_queues(),
            queue_size: network.queue_size(),
        }
    }
}

/// Saved state of a network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its configuration.
    pub config: NetConfig,
    /// Feature bits that it offers.
    pub features: u64,
    /// Number of queue pairs that the driver negotiated (`VIRTIO_NET_CTRL_MQ`).
    pub active_pairs: u16,
    /// Offloads that the driver accepts for received frames: `GUEST_` feature bits.
    pub offloads: u64,
    /// Whether the link is up.
    pub link_up: bool,
    /// Whether the driver accepted `VIRTIO_NET_F_GUEST_ANNOUNCE`.
    pub can_announce: bool,
    /// Generation of the configuration space.
    pub generation: u32,
    /// Earlier MAC addresses of the guest that a running driver may still use: the first and the
    /// last. None: the guest chose its own.
    #[serde(default)]
    pub former_macs: Vec<Option<[u8; 6]>>,
    /// State of the rate limiter for frames to the guest.
    pub rx_limiter: RateLimiterState,
    /// State of the rate limiter for frames from the guest.
    pub tx_limiter: RateLimiterState,
}

impl DeviceData for NetState {
    const NAME: &'static str = "Net";
}
