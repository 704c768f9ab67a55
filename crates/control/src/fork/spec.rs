//! What each child of a fork is to be. All that can fail here is done before the guest is paused.

use config::{Child, NetworkInterface, Vsock, apply_network_overrides};
use net::NetBackend;

use crate::api::{ApiServer, Limits};
use crate::child::{ChildSpec, Reporter};
use crate::microvm::MicroVm;
use crate::networks::open_existing;
use crate::overlays::plan::OverlayPlan;
use crate::vsock::VsockSockets;
use crate::{CommandError, Identity};

/// The child that `child` asks for, with its API socket bound and its networks open.
pub(super) fn child_spec(
    vm: &MicroVm,
    child: &Child,
    plan: OverlayPlan,
    reporter: Reporter,
) -> Result<ChildSpec, CommandError> {
    let of_child = |error: CommandError| CommandError::child(child.id.as_str(), error);
    let mut config = vm.backends.config();
    let networks = open_networks(vm, child, &mut config.network_interfaces).map_err(of_child)?;
    // A child does not write to its parent's terminal or file.
    config.serial = Some(child.serial.clone().unwrap_or_default());
    config.vsock = vsock(config.vsock.as_ref(), child).map_err(of_child)?;
    if child.logger.is_some() {
        config.logger.clone_from(&child.logger);
    }
    let limits = Limits { max_payload: vm.platform.max_payload, ..Limits::default() };
    let api = child.api_socket.as_deref().map(|path| ApiServer::bind(path, limits)).transpose();
    Ok(ChildSpec {
        identity: Identity { id: child.id.as_str().to_owned(), ..vm.instance.identity().clone() },
        api: api.map_err(|error| CommandError::child(child.id.as_str(), error))?,
        logger: child.logger.clone(),
        metrics: child.metrics.clone(),
        cgroup: child.cgroup.clone(),
        reporter,
        platform: vm.platform,
        config,
        plan,
        metadata: vm.metadata.child(child.mmds.clone()).map_err(of_child)?,
        networks,
        resume: child.resume,
    })
}

/// Opens the child's networks. `networks` is the parent's configuration, and becomes the child's.
fn open_networks(
    vm: &MicroVm,
    child: &Child,
    networks: &mut [NetworkInterface],
) -> Result<Vec<NetBackend>, CommandError> {
    networks.iter_mut().for_each(NetworkInterface::clear_host_endpoint);
    apply_network_overrides(networks, &child.network_overrides)?;
    let parents = vm.backends.networks.configs();
    let parents: Vec<_> = parents.iter().flat_map(|network| network.fds.iter().flatten()).collect();
    for network in &*networks {
        if let Some(fd) = network.fds.iter().flatten().find(|fd| parents.contains(fd)) {
            let id = &network.iface_id;
            return Err(CommandError::ParentTap { id: id.clone(), fd: *fd });
        }
    }
    open_existing(networks)
}

/// The vsock device of a child. Its path is empty if it was not overridden: then it has no sockets,
/// and no configuration of a user can have that path.
fn vsock(parents: Option<&Vsock>, child: &Child) -> Result<Option<Vsock>, CommandError> {
    let Some(parents) = parents else {
        return if child.vsock_override.is_some() { Err(CommandError::NoVsock) } else { Ok(None) };
    };
    let Some(by) = &child.vsock_override else {
        return Ok(Some(Vsock { uds_path: "".into(), seqpacket_uds_path: None, ..parents.clone() }));
    };
    let vsock = parents.overridden(by);
    vsock.check()?;
    VsockSockets::check_possible(&vsock)?;
    Ok(Some(vsock))
}
