//! A method for each endpoint of the API.

use config::{
    Action, ActionType, BootSource, CpuConfig, Drive, DriveUpdate, Entropy, Fork, ForkOutcome, FullVmConfig,
    InstanceInfo, Logger, MachineConfig, MachineConfigUpdate, Metrics, MmdsConfig, NetworkInterface,
    NetworkInterfaceUpdate, ResourceId, Serial, SnapshotCreate, SnapshotJob, SnapshotLoad, Version, Vm,
    VmState, Vsock,
};
use serde::Serialize;
use serde_json::Value;

use crate::client::{Client, Repeat};
use crate::error::Error;

/// What the microVM is, and its configuration.
impl Client {
    /// `GET /`: what the microVM is, and its state.
    pub fn instance(&mut self) -> Result<InstanceInfo, Error> {
        self.get("/")
    }

    /// `GET /version`: the version of Firecracker whose API this is.
    pub fn version(&mut self) -> Result<String, Error> {
        self.get("/version").map(|version: Version| version.firecracker_version)
    }

    /// `GET /vm/config`: the whole configuration. With a boot source it is a configuration file.
    pub fn vm_config(&mut self) -> Result<FullVmConfig, Error> {
        self.get("/vm/config")
    }

    /// `GET /machine-config`: vCPUs and memory.
    pub fn machine_config(&mut self) -> Result<MachineConfig, Error> {
        self.get("/machine-config")
    }

    /// `PUT /machine-config`: sets vCPUs and memory.
    pub fn put_machine_config(&mut self, config: &MachineConfig) -> Result<(), Error> {
        self.set("PUT", "/machine-config", config)
    }

    /// `PATCH /machine-config`: changes vCPUs and memory.
    pub fn patch_machine_config(&mut self, update: &MachineConfigUpdate) -> Result<(), Error> {
        self.set("PATCH", "/machine-config", update)
    }

    /// `PUT /cpu-config`: sets a custom CPU template.
    pub fn put_cpu_config(&mut self, template: &CpuConfig) -> Result<(), Error> {
        self.set("PUT", "/cpu-config", template)
    }

    /// `PUT /boot-source`: sets kernel, initrd and command line.
    pub fn put_boot_source(&mut self, source: &BootSource) -> Result<(), Error> {
        self.set("PUT", "/boot-source", source)
    }

    /// `PUT /logger`: configures the monitor's log.
    pub fn put_logger(&mut self, logger: &Logger) -> Result<(), Error> {
        self.set("PUT", "/logger", logger)
    }

    /// `PUT /metrics`: sets the output of metrics. Possible once, so it is not repeated.
    pub fn put_metrics(&mut self, metrics: &Metrics) -> Result<(), Error> {
        self.put("/metrics", metrics)
    }

    /// `GET /metrics`: the metrics as Prometheus text.
    pub fn metrics(&mut self) -> Result<String, Error> {
        let request = self.request("GET", "/metrics", Repeat::Harmless);
        self.accepted(&request).map(|response| response.body)
    }

    /// `GET /openapi.json`: the description of the API.
    pub fn openapi(&mut self) -> Result<Value, Error> {
        self.get("/openapi.json")
    }

    /// `PUT /serial`: sets the host end of the serial console.
    pub fn put_serial(&mut self, serial: &Serial) -> Result<(), Error> {
        self.set("PUT", "/serial", serial)
    }

    /// `PUT /drives/{id}`: adds a drive, or replaces the one with this id.
    pub fn put_drive(&mut self, drive: &Drive) -> Result<(), Error> {
        self.set("PUT", &path_of("/drives", &drive.drive_id)?, drive)
    }

    /// `PATCH /drives/{id}`: changes the disk or the limits of a drive of a started guest.
    pub fn patch_drive(&mut self, update: &DriveUpdate) -> Result<(), Error> {
        self.set("PATCH", &path_of("/drives", &update.drive_id)?, update)
    }

    /// `PUT /network-interfaces/{id}`: adds a network interface, or replaces the one with this id.
    pub fn put_network_interface(&mut self, interface: &NetworkInterface) -> Result<(), Error> {
        self.set("PUT", &path_of("/network-interfaces", &interface.iface_id)?, interface)
    }

    /// `PATCH /network-interfaces/{id}`: changes the limits of an interface of a started guest.
    pub fn patch_network_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), Error> {
        self.set("PATCH", &path_of("/network-interfaces", &update.iface_id)?, update)
    }

    /// `PUT /entropy`: adds the entropy device.
    pub fn put_entropy(&mut self, entropy: &Entropy) -> Result<(), Error> {
        self.set("PUT", "/entropy", entropy)
    }

    /// `PUT /vsock`: adds the vsock device, or replaces it.
    pub fn put_vsock(&mut self, vsock: &Vsock) -> Result<(), Error> {
        self.set("PUT", "/vsock", vsock)
    }

    /// `PUT /mmds/config`: sets how the guest reaches the metadata service.
    pub fn put_mmds_config(&mut self, config: &MmdsConfig) -> Result<(), Error> {
        self.set("PUT", "/mmds/config", config)
    }

    /// `GET /mmds`: the contents of the metadata service.
    pub fn mmds(&mut self) -> Result<Value, Error> {
        self.get("/mmds")
    }

    /// `PUT /mmds`: replaces the contents of the metadata service by this JSON object.
    pub fn put_mmds(&mut self, contents: &Value) -> Result<(), Error> {
        self.set("PUT", "/mmds", contents)
    }

    /// `PATCH /mmds`: merges this JSON object into the contents (RFC 7396).
    pub fn patch_mmds(&mut self, patch: &Value) -> Result<(), Error> {
        self.set("PATCH", "/mmds", patch)
    }

    /// Sends a part of the configuration. A `PUT` again changes nothing; a `PATCH` may fill a token
    /// bucket again, or replace a disk again.
    fn set(&mut self, method: &'static str, path: &str, body: &impl Serialize) -> Result<(), Error> {
        let repeat = if method == "PUT" { Repeat::Harmless } else { Repeat::Never };
        self.tell(&self.request(method, path, repeat).with_body(body)?)
    }
}

/// What the microVM is to do.
impl Client {
    /// `PUT /actions`, `InstanceStart`: boots the guest. Returns when it runs.
    pub fn start(&mut self) -> Result<(), Error> {
        self.act(ActionType::InstanceStart)
    }

    /// `PUT /actions`, `FlushMetrics`: writes the metrics now.
    pub fn flush_metrics(&mut self) -> Result<(), Error> {
        self.act(ActionType::FlushMetrics)
    }

    /// `PUT /actions`, `SendCtrlAltDel`: presses Ctrl+Alt+Del, upon which most guests shut down.
    pub fn send_ctrl_alt_del(&mut self) -> Result<(), Error> {
        self.act(ActionType::SendCtrlAltDel)
    }

    /// `PATCH /vm`: pauses the guest. No error if it is paused.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.set_state(VmState::Paused)
    }

    /// `PATCH /vm`: resumes the guest. No error if it runs.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.set_state(VmState::Resumed)
    }

    /// `PUT /snapshot/create`: saves the guest. Returns the job of a live snapshot, which may still
    /// run; `None` for a snapshot of a paused guest, which is complete.
    pub fn create_snapshot(&mut self, create: &SnapshotCreate) -> Result<Option<SnapshotJob>, Error> {
        let request = self.request("PUT", "/snapshot/create", Repeat::Never).with_body(create)?;
        let request = request.within(self.timeouts().long);
        if create.live {
            return self.ask(&request).map(Some);
        }
        self.tell(&request).map(|()| None)
    }

    /// `GET /snapshot/job`: how far the last live snapshot is.
    pub fn snapshot_job(&mut self) -> Result<SnapshotJob, Error> {
        self.get("/snapshot/job")
    }

    /// `DELETE /snapshot/job`: cancels the live snapshot.
    pub fn cancel_snapshot_job(&mut self) -> Result<(), Error> {
        self.tell(&self.request("DELETE", "/snapshot/job", Repeat::Never))
    }

    /// `PUT /snapshot/load`: restores a guest in a new monitor.
    pub fn load_snapshot(&mut self, load: &SnapshotLoad) -> Result<(), Error> {
        let request = self.request("PUT", "/snapshot/load", Repeat::Never).with_body(load)?;
        self.tell(&request.within(self.timeouts().long))
    }

    /// `PUT /fork`: starts children of the running guest. An error only if no child has started:
    /// the outcome has the error of each one that has not.
    pub fn fork(&mut self, fork: &Fork) -> Result<ForkOutcome, Error> {
        let request = self.request("PUT", "/fork", Repeat::Never).with_body(fork)?;
        self.ask(&request.within(self.timeouts().long))
    }

    fn act(&mut self, action_type: ActionType) -> Result<(), Error> {
        let request = self.request("PUT", "/actions", Repeat::Never).with_body(&Action { action_type })?;
        self.tell(&request.within(self.timeouts().long))
    }

    fn set_state(&mut self, state: VmState) -> Result<(), Error> {
        let request = self.request("PATCH", "/vm", Repeat::Never).with_body(&Vm { state })?;
        self.tell(&request.within(self.timeouts().long))
    }
}

/// The path of one of several devices. Only letters, digits and underscores can be in it.
fn path_of(kind: &str, id: &str) -> Result<String, Error> {
    let id: ResourceId = id.parse()?;
    Ok(format!("{kind}/{id}"))
}
