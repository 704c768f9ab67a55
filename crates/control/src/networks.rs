//! [`Networks`]: the network interfaces of a microVM, each with its backend.
//!
//! # Invariants
//!
//! - Before the guest starts, an interface has its backend open. After that the machine alone has
//!   it: a backend that disappears is closed there.

use config::{MmdsConfig, NetworkInterface, NetworkInterfaceUpdate, check_networks};
use net::{NetBackend, NetControl};
use virtio::worker::monotonic;

use crate::CommandError;
use crate::reopen::{Reopened, open_or_reopen};

/// One network interface.
#[derive(Debug)]
struct NetworkSlot {
    config: NetworkInterface,
    /// `None` once the machine has it.
    backend: Option<NetBackend>,
}

/// The network interfaces of a microVM, in the order in which they were configured.
#[derive(Debug, Default)]
pub(crate) struct Networks {
    slots: Vec<NetworkSlot>,
}

impl Networks {
    /// These interfaces with their backends, in the same order.
    pub(crate) fn with_backends(configs: Vec<NetworkInterface>, backends: Vec<NetBackend>) -> Self {
        let slots = configs.into_iter().zip(backends);
        Networks {
            slots: slots.map(|(config, backend)| NetworkSlot { config, backend: Some(backend) }).collect(),
        }
    }

    /// The configuration of each interface.
    pub(crate) fn configs(&self) -> Vec<NetworkInterface> {
        self.slots.iter().map(|slot| slot.config.clone()).collect()
    }

    /// Each interface with its backend, as long as the machine does not have them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&NetworkInterface, &NetBackend)> {
        self.slots.iter().filter_map(|slot| Some((&slot.config, slot.backend.as_ref()?)))
    }

    /// Leaves the backends to the machine.
    pub(crate) fn release(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.backend = None);
    }

    fn position(&self, id: &str) -> Option<usize> {
        self.slots.iter().position(|slot| slot.config.iface_id == id)
    }

    /// Adds an interface, or puts `network` in the place of the one that has its id. Opens its
    /// backend.
    ///
    /// On an error the interfaces are as they were. But one whose backend had to be closed and can
    /// no longer be opened is removed.
    pub(crate) fn put(
        &mut self,
        network: &NetworkInterface,
        mmds: Option<&MmdsConfig>,
    ) -> Result<(), CommandError> {
        let at = self.position(&network.iface_id);
        let mut networks = self.configs();
        match at {
            Some(at) => networks[at] = network.clone(),
            None => networks.push(network.clone()),
        }
        check_networks(&networks)?;
        if let Some(mmds) = mmds {
            mmds.check_interfaces(&networks)?;
        }
        match at {
            None => {
                let backend = Some(NetBackend::open(network)?);
                self.slots.push(NetworkSlot { config: network.clone(), backend });
                Ok(())
            }
            Some(at) => self.replace(at, network),
        }
    }

    /// Puts `network` in the place of the interface at `at`.
    fn replace(&mut self, at: usize, network: &NetworkInterface) -> Result<(), CommandError> {
        let slot = &mut self.slots[at];
        // A tap that the monitor created would disappear with its last user, and so would the
        // server of a single connection.
        let stays = slot.config.has_same_host_endpoint(network)
            && slot.backend.as_ref().is_some_and(NetBackend::is_there);
        if stays {
            slot.config = network.clone();
            return Ok(());
        }
        // A tap has one user: it is closed first where both interfaces name the same one.
        let same_tap =
            slot.config.host_dev_name.is_some() && slot.config.host_dev_name == network.host_dev_name;
        if !same_tap {
            slot.backend = Some(NetBackend::open(network)?);
            slot.config = network.clone();
            return Ok(());
        }
        slot.backend = None;
        match open_or_reopen(network, &slot.config, |network| Ok(NetBackend::open(network)?)) {
            Reopened::New(backend) => {
                *slot = NetworkSlot { config: network.clone(), backend: Some(backend) };
                Ok(())
            }
            Reopened::Old(backend, error) => {
                slot.backend = Some(backend);
                Err(error)
            }
            Reopened::Nothing { error, lost } => {
                log::error!("{lost}; the interface is removed");
                self.slots.remove(at);
                Err(error)
            }
        }
    }

    /// Changes the rate limits of an interface of a started guest, whose device has `control`.
    pub(crate) fn patch(
        &mut self,
        update: &NetworkInterfaceUpdate,
        control: Option<&NetControl>,
    ) -> Result<(), CommandError> {
        let (Some(at), Some(control)) = (self.position(&update.iface_id), control) else {
            return Err(CommandError::NoSuchNetwork(update.iface_id.clone()));
        };
        let slot = &mut self.slots[at];
        let network = slot.config.updated(update)?;
        let [rx, tx] = [update.rx_rate_limiter, update.tx_rate_limiter]
            .map(|limiter| machine::devices::limits(limiter.as_ref()));
        control.update_limits(rx, tx, monotonic());
        slot.config = network;
        Ok(())
    }
}

/// Opens the backends of a restored or forked guest. A missing tap is an error; it is never
/// created.
pub(crate) fn open_existing(networks: &[NetworkInterface]) -> Result<Vec<NetBackend>, CommandError> {
    networks.iter().map(|network| Ok(NetBackend::open_existing(network)?)).collect()
}
