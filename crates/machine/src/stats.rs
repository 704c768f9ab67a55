//! Counters of a machine: [`MachineStats`], a handle to those of all its parts.
//!
//! Each part owns its counters and adds to them without a lock. A handle reads them from any thread
//! as long as it lives, also while the machine is paused or is being paused on another thread.

use std::sync::Arc;
use std::time::Instant;

use block::BlockStats;
use entropy::EntropyStats;
use net::NetStats;
use sync::{Counter, Latency};
use virtio::device::TransportStats;
use vsock::VsockStats;

/// Counters of one kind of exit of a vCPU.
#[derive(Debug, Default)]
pub struct ExitStats {
    /// Exits.
    pub count: Counter,
    /// Time that it took to handle them.
    pub latency: Latency,
}

impl ExitStats {
    /// Counts an exit and measures `handle`.
    pub(crate) fn measure(&self, handle: impl FnOnce()) {
        // Before it is handled: that may end the process.
        self.count.add(1);
        let begun = Instant::now();
        handle();
        self.latency.record(u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Counters of one vCPU.
#[derive(Debug, Default)]
pub struct VcpuStats {
    /// Reads of a port.
    pub io_in: ExitStats,
    /// Writes to a port.
    pub io_out: ExitStats,
    /// Reads of memory-mapped registers.
    pub mmio_read: ExitStats,
    /// Writes to memory-mapped registers.
    pub mmio_write: ExitStats,
    /// Exits after which the guest cannot run any further.
    pub failures: Counter,
    /// Times that KVM refused to tell the guest's clock that the vCPU was paused
    /// (`KVM_KVMCLOCK_CTRL`). It does so for guests without such a clock.
    pub kvmclock_ctrl_fails: Counter,
}

/// Counters of the serial port, in bytes.
#[derive(Debug, Default)]
pub struct SerialStats {
    /// Bytes that the guest read.
    pub read: Counter,
    /// Bytes that the guest wrote.
    pub written: Counter,
    /// Bytes that were dropped because the host does not read them.
    pub dropped: Counter,
    /// Bytes that were dropped because they exceeded the rate limit.
    pub limited: Counter,
}

/// Counters of the keyboard controller.
#[derive(Debug, Default)]
pub struct KeyboardStats {
    /// Reads of its registers.
    pub reads: Counter,
    /// Writes to its registers.
    pub writes: Counter,
    /// Reads of ports that are no register.
    pub missed_reads: Counter,
    /// Writes to ports that are no register.
    pub missed_writes: Counter,
    /// Resets that the guest asked for.
    pub resets: Counter,
    /// Times that Ctrl+Alt+Del was refused because the guest does not read its keyboard.
    pub refused_keys: Counter,
}

/// Counters of one device of a kind with ids.
#[derive(Debug)]
pub struct DeviceStats<S> {
    /// The device's id.
    pub id: String,
    /// Its counters.
    pub stats: Arc<S>,
    /// Those of its transport.
    pub transport: Arc<TransportStats>,
}

/// A handle to all counters of a machine.
#[derive(Debug)]
pub struct MachineStats {
    /// The vCPUs.
    pub vcpus: Vec<Arc<VcpuStats>>,
    /// The serial port.
    pub serial: Arc<SerialStats>,
    /// The keyboard controller.
    pub keyboard: Arc<KeyboardStats>,
    /// The devices.
    pub devices: DevicesStats,
}

/// A handle to the counters of a machine's devices.
#[derive(Debug, Default)]
pub struct DevicesStats {
    /// Drives, by id.
    pub drives: Vec<DeviceStats<BlockStats>>,
    /// Network interfaces, by id.
    pub networks: Vec<DeviceStats<NetStats>>,
    /// The entropy device.
    pub entropy: Option<DeviceStats<EntropyStats>>,
    /// The socket device.
    pub vsock: Option<DeviceStats<VsockStats>>,
    /// The metadata service.
    pub metadata: Option<Arc<mmds::Service>>,
}

impl DevicesStats {
    /// The counters of all transports.
    pub fn transports(&self) -> impl Iterator<Item = &TransportStats> {
        let drives = self.drives.iter().map(|device| &*device.transport);
        let networks = self.networks.iter().map(|device| &*device.transport);
        let entropy = self.entropy.iter().map(|device| &*device.transport);
        let vsock = self.vsock.iter().map(|device| &*device.transport);
        drives.chain(networks).chain(entropy).chain(vsock)
    }
}
