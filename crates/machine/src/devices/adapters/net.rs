//! Network interfaces: the `net` crate.

use config::NetworkInterface;
use net::{Net, NetBackend, NetConfig, NetControl, NetSetup, NetState};

use super::mmds;
use crate::devices::adapter::{BuildContext, BuildError, Built, DeviceAdapter, IoWorkers, limits};

/// Adapts network interfaces.
pub(crate) struct NetAdapter;

/// vhost cannot be combined with dirty page tracking: the kernel's writes to guest memory are not
/// logged.
#[derive(Debug, thiserror::Error)]
#[error("network interface {0}: backend vhost cannot be combined with track_dirty_pages")]
struct VhostTracked(String);

impl DeviceAdapter for NetAdapter {
    const NOUN: &'static str = "net";
    type Setup = (NetworkInterface, NetBackend);
    type State = NetState;
    type Control = NetControl;

    fn id((network, _): &Self::Setup) -> Option<&str> {
        Some(&network.iface_id)
    }

    fn io_workers((network, _): &Self::Setup, _state: Option<&NetState>) -> Result<IoWorkers, BuildError> {
        Ok(IoWorkers::Shared(network.io_threads()))
    }

    fn new((network, backend): Self::Setup, context: BuildContext<'_>) -> Built<NetControl> {
        let config = NetConfig::of(&network);
        let rx_limits = limits(network.rx_rate_limiter.as_ref());
        let tx_limits = limits(network.tx_rate_limiter.as_ref());
        let setup = net_setup(&network, backend, &context)?;
        let (device, control) = Net::new(config, setup, rx_limits, tx_limits, context.now)?;
        Ok((Box::new(device), control))
    }

    fn restore(
        (network, backend): Self::Setup,
        state: &NetState,
        context: BuildContext<'_>,
    ) -> Built<NetControl> {
        let mac = network.guest_mac.map(|mac| mac.0);
        let setup = net_setup(&network, backend, &context)?;
        let (device, control) = Net::restore(state, mac, setup, context.now)?;
        Ok((Box::new(device), control))
    }
}

/// What the device is connected to: its backend, and the metadata service where it has one.
fn net_setup(
    network: &NetworkInterface,
    backend: NetBackend,
    context: &BuildContext<'_>,
) -> Result<NetSetup, VhostTracked> {
    if backend.is_vhost() && context.tracks_dirty_pages {
        return Err(VhostTracked(network.iface_id.clone()));
    }
    let interceptor = mmds::interceptor(context.metadata, network, context.now);
    Ok(NetSetup { backend, interceptor })
}
