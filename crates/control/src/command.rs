//! [`Command`]: the one list of commands to a microVM, from the API, the command line and the
//! configuration file.

use std::borrow::Cow;

use config::{
    BootSource, CpuConfig, Drive, DriveUpdate, Entropy, Fork, Logger, MachineConfig, MachineConfigUpdate,
    Metrics, MmdsConfig, NetworkInterface, NetworkInterfaceUpdate, Serial, SnapshotCreate, SnapshotLoad,
    VmState, Vsock,
};

/// A command, checked in form and bounds. The main thread runs one at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Describe the microVM and its state: `GET /`.
    DescribeInstance,
    /// Tell the version: `GET /version`.
    GetVersion,
    /// Describe the API: `GET /openapi.json`, an extension.
    GetOpenApi,
    /// Show the settings of processors and memory: `GET /machine-config`.
    GetMachineConfig,
    /// Set processors and memory; absent fields return to their defaults.
    PutMachineConfig(MachineConfig),
    /// Change processors and memory; absent fields stay.
    PatchMachineConfig(MachineConfigUpdate),
    /// Set the custom CPU template, in place of any other template.
    PutCpuConfig(CpuConfig),
    /// Set the kernel, initrd and boot arguments.
    PutBootSource(BootSource),
    /// Configure the monitor's log.
    PutLogger(Logger),
    /// Set the output of metrics.
    PutMetrics(Metrics),
    /// Show the totals of all counters as Prometheus text: `GET /metrics`, an extension.
    GetMetrics,
    /// Set the host end of the serial console.
    PutSerial(Serial),
    /// Add a drive, or replace the one with this id.
    PutDrive(Drive),
    /// Change the disk or the rate limits of a drive of a started guest.
    PatchDrive(DriveUpdate),
    /// Add a network interface, or replace the one with this id.
    PutNetwork(NetworkInterface),
    /// Change the rate limits of a network interface of a started guest.
    PatchNetwork(NetworkInterfaceUpdate),
    /// Add or replace the entropy device.
    PutEntropy(Entropy),
    /// Add or replace the vsock device.
    PutVsock(Vsock),
    /// Set the interfaces and the protocol by which the guest reaches the metadata service.
    PutMmdsConfig(MmdsConfig),
    /// Show the contents of the metadata service: `GET /mmds`.
    GetMmds,
    /// Replace the contents of the metadata service.
    PutMmds(serde_json::Value),
    /// Merge into the contents of the metadata service (RFC 7396).
    PatchMmds(serde_json::Value),
    /// Boot the guest.
    Start,
    /// Write the metrics out now.
    FlushMetrics,
    /// Press Ctrl+Alt+Del on the guest's keyboard.
    SendCtrlAltDel,
    /// Pause or resume. No error if the guest is in that state already.
    SetVmState(VmState),
    /// Show the whole configuration: `GET /vm/config`.
    GetVmConfig,
    /// Save the microVM to a snapshot.
    CreateSnapshot(SnapshotCreate),
    /// Show the progress of a live snapshot: `GET /snapshot/job`, an extension.
    DescribeJob,
    /// Cancel a live snapshot: `DELETE /snapshot/job`, an extension.
    CancelJob,
    /// Restore a microVM from a snapshot.
    LoadSnapshot(SnapshotLoad),
    /// Fork the microVM into children: `PUT /fork`, an extension.
    Fork(Fork),
}

impl Command {
    /// Whether the command describes a microVM to boot, after which no snapshot can be loaded.
    ///
    /// `PUT /vsock` does not: before a load it sets the paths of the sockets. Nor does `PUT
    /// /cpu-config`, as with Firecracker; the loaded microVM has its own template.
    pub fn describes_boot(&self) -> bool {
        matches!(
            self,
            Command::PutMachineConfig(_)
                | Command::PatchMachineConfig(_)
                | Command::PutBootSource(_)
                | Command::PutDrive(_)
                | Command::PutNetwork(_)
                | Command::PutEntropy(_)
                | Command::PutMmdsConfig(_)
        )
    }

    /// The name of the command in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Command::DescribeInstance => "GET /",
            Command::GetVersion => "GET /version",
            Command::GetOpenApi => "GET /openapi.json",
            Command::GetMachineConfig => "GET /machine-config",
            Command::PutMachineConfig(_) => "PUT /machine-config",
            Command::PatchMachineConfig(_) => "PATCH /machine-config",
            Command::PutCpuConfig(_) => "PUT /cpu-config",
            Command::PutBootSource(_) => "PUT /boot-source",
            Command::PutLogger(_) => "PUT /logger",
            Command::PutMetrics(_) => "PUT /metrics",
            Command::GetMetrics => "GET /metrics",
            Command::PutSerial(_) => "PUT /serial",
            Command::PutDrive(_) => "PUT /drives",
            Command::PatchDrive(_) => "PATCH /drives",
            Command::PutNetwork(_) => "PUT /network-interfaces",
            Command::PatchNetwork(_) => "PATCH /network-interfaces",
            Command::PutEntropy(_) => "PUT /entropy",
            Command::PutVsock(_) => "PUT /vsock",
            Command::PutMmdsConfig(_) => "PUT /mmds/config",
            Command::GetMmds => "GET /mmds",
            Command::PutMmds(_) => "PUT /mmds",
            Command::PatchMmds(_) => "PATCH /mmds",
            Command::Start => "InstanceStart",
            Command::FlushMetrics => "FlushMetrics",
            Command::SendCtrlAltDel => "SendCtrlAltDel",
            Command::SetVmState(VmState::Paused) => "pausing",
            Command::SetVmState(VmState::Resumed) => "resuming",
            Command::GetVmConfig => "GET /vm/config",
            Command::CreateSnapshot(_) => "PUT /snapshot/create",
            Command::DescribeJob => "GET /snapshot/job",
            Command::CancelJob => "DELETE /snapshot/job",
            Command::LoadSnapshot(_) => "PUT /snapshot/load",
            Command::Fork(_) => "PUT /fork",
        }
    }
}

/// The answer to a command that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Nothing: HTTP status 204.
    Empty,
    /// A JSON value: HTTP status 200.
    Json(serde_json::Value),
    /// A text: HTTP status 200.
    Text {
        /// Its media type.
        content_type: &'static str,
        /// The text.
        body: Cow<'static, str>,
    },
}
