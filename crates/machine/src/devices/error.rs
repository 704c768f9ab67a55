//! Why a machine cannot have its devices.

use std::error::Error;
use std::io;

use virtio::device::DecodeError;
use virtio::transport::RestoreError;

use crate::kvm::KvmError;

/// Why a machine cannot have its devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// More devices than the transport has slots or interrupt lines.
    #[error("virtio devices: {count} are configured; at most {max}, one for each {of}")]
    TooMany {
        /// How many were asked for.
        count: usize,
        /// How many there can be.
        max: usize,
        /// The resource of which each device needs one.
        of: &'static str,
    },
    /// The saved machine had other devices.
    #[error("virtio devices: the machine has [{here}]; it was saved with [{saved}]")]
    OtherDevices {
        /// Names of the devices that it has.
        here: String,
        /// Names of the devices that it was saved with.
        saved: String,
    },
    /// The saved machine had its devices on the other transport.
    #[error(
        "virtio devices: this process puts them on virtio-{}, and they were saved on virtio-{}; \
         start vesta-vmm {} --enable-pci",
        if *pci { "pci" } else { "mmio" },
        if *pci { "mmio" } else { "pci" },
        if *pci { "without" } else { "with" },
    )]
    OtherTransport {
        /// Whether this process puts devices on PCI.
        pci: bool,
    },
    /// The saved state of a device is that of another kind of device, or damaged.
    #[error("{name}: {source}")]
    State {
        /// The device.
        name: String,
        /// What is wrong with the state.
        source: DecodeError,
    },
    /// The device table has no such kind.
    #[error("{name}: the saved state is that of a {kind} device; this version has no such device")]
    UnknownKind {
        /// The device.
        name: String,
        /// The kind of device that was saved.
        kind: String,
    },
    /// A transport does not take its saved state.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A device cannot be built from its setup. The text names the device.
    #[error(transparent)]
    Build(Box<dyn Error + Send + Sync>),
    /// The host is out of threads or descriptors.
    #[error("cannot create {what}: {source}")]
    Host {
        /// What was to be created.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}
