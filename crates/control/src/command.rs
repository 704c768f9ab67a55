//! The one list of what a microVM can be told, wherever it comes from.

use config::{
    BootSource, Drive, DriveUpdate, Entropy, Fork, Logger, MachineConfig, MachineConfigUpdate, MmdsConfig,
    NetworkInterface, NetworkInterfaceUpdate, Serial, SnapshotCreate, SnapshotLoad, VmState, Vsock,
};

/// Something to do or to tell, checked in form and bounds. The main thread runs one at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Who and in which state: `GET /`.
    DescribeInstance,
    /// Which version: `GET /version`.
    GetVersion,
    /// Processors and memory as they are set: `GET /machine-config`.
    GetMachineConfig,
    /// Set processors and memory; what is not given returns to its default.
    PutMachineConfig(MachineConfig),
    /// Change processors and memory; what is not given stays.
    PatchMachineConfig(MachineConfigUpdate),
    /// Set what to boot.
    PutBootSource(BootSource),
    /// Set how the monitor logs.
    PutLogger(Logger),
    /// Set where the serial console goes.
    PutSerial(Serial),
    /// Add a drive, or set it anew.
    PutDrive(Drive),
    /// Change a drive of a started guest: its disk, its limits.
    PatchDrive(DriveUpdate),
    /// Add a network interface, or set it anew.
    PutNetwork(NetworkInterface),
    /// Change the limits of a network interface of a started guest.
    PatchNetwork(NetworkInterfaceUpdate),
    /// Add the entropy device, or set it anew.
    PutEntropy(Entropy),
    /// Add the socket device, or set it anew.
    PutVsock(Vsock),
    /// Set through what and how the guest reaches the metadata service.
    PutMmdsConfig(MmdsConfig),
    /// What the guest can learn: `GET /mmds`.
    GetMmds,
    /// Set what the guest can learn.
    PutMmds(serde_json::Value),
    /// Change what the guest can learn (RFC 7396).
    PatchMmds(serde_json::Value),
    /// Boot the guest.
    Start,
    /// Write the metrics out now.
    FlushMetrics,
    /// Press Ctrl+Alt+Del on the guest's keyboard.
    SendCtrlAltDel,
    /// Pause or resume; the present state again is no error.
    SetVmState(VmState),
    /// The whole configuration: `GET /vm/config`.
    GetVmConfig,
    /// Save the guest.
    CreateSnapshot(SnapshotCreate),
    /// How far a live snapshot is: `GET /snapshot/job`, an extension.
    DescribeJob,
    /// Give a live snapshot up: `DELETE /snapshot/job`, an extension.
    CancelJob,
    /// Go on with a guest that was saved.
    LoadSnapshot(SnapshotLoad),
    /// Make children of the guest as it is: `PUT /fork`, an extension.
    Fork(Fork),
}

impl Command {
    /// Whether it describes a machine to boot, which a snapshot cannot then be loaded into. `PUT /vsock` does not: before a
    /// load it says where the sockets are.
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

    /// What its user calls it, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Command::DescribeInstance => "GET /",
            Command::GetVersion => "GET /version",
            Command::GetMachineConfig => "GET /machine-config",
            Command::PutMachineConfig(_) => "PUT /machine-config",
            Command::PatchMachineConfig(_) => "PATCH /machine-config",
            Command::PutBootSource(_) => "PUT /boot-source",
            Command::PutLogger(_) => "PUT /logger",
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

/// The answer to a command that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done, and there is nothing to say: 204.
    Empty,
    /// What was asked for: 200.
    Json(serde_json::Value),
}
