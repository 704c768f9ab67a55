//! [`OPERATIONS`]: what each endpoint is for, takes and answers.
//!
//! `control` has the table of endpoints itself. A test there compares both.

use config::{
    Action, BootSource, CpuConfig, Drive, DriveUpdate, Entropy, Fork, ForkOutcome, FullVmConfig,
    InstanceInfo, Logger, MachineConfig, MachineConfigUpdate, Metrics, MmdsConfig, NetworkInterface,
    NetworkInterfaceUpdate, Serial, SnapshotCreate, SnapshotJob, SnapshotLoad, Version, Vm, Vsock,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use self::When::{AfterStart, Always, BeforeStart};

/// The schema of a body or of an answer.
pub(crate) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// One method of one path.
pub(crate) struct Operation {
    pub(crate) method: &'static str,
    pub(crate) path: &'static str,
    /// A name for programs: clients that are generated call their function so.
    pub(crate) id: &'static str,
    /// What it does, as a sentence without its full stop.
    pub(crate) summary: &'static str,
    /// What else a client must know.
    pub(crate) more: &'static str,
    pub(crate) when: When,
    pub(crate) body: Option<Body>,
    pub(crate) answers: &'static [Answer],
    /// Whether a request can have something deprecated, which the answer's header then says.
    pub(crate) deprecation: bool,
    /// Whether Firecracker does not have it.
    pub(crate) extension: bool,
}

/// When an operation is possible.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When {
    Always,
    BeforeStart,
    AfterStart,
}

/// The JSON that a request must have.
pub(crate) struct Body {
    pub(crate) schema: SchemaOf,
    /// A valid body.
    pub(crate) example: &'static str,
}

/// An answer to a request that succeeds, or one that only some operations have.
pub(crate) struct Answer {
    pub(crate) status: &'static str,
    pub(crate) description: &'static str,
    pub(crate) media_type: &'static str,
    pub(crate) schema: Option<SchemaOf>,
}

const JSON: &str = "application/json";
const DONE: &[Answer] = &[Answer { status: "204", description: "Done.", media_type: JSON, schema: None }];
const METADATA_DONE: &[Answer] = &[
    Answer { status: "204", description: "Done.", media_type: JSON, schema: None },
    Answer {
        status: "413",
        description: "The contents would be larger than `--mmds-size-limit`. Nothing was changed.",
        media_type: JSON,
        schema: Some(of::<config::Fault>),
    },
];

const fn json(schema: SchemaOf, description: &'static str) -> Answer {
    Answer { status: "200", description, media_type: JSON, schema: Some(schema) }
}

/// An answer that is no JSON.
const fn text(media_type: &'static str, description: &'static str) -> Answer {
    Answer { status: "200", description, media_type, schema: Some(any_text) }
}

/// The schema of a type.
fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "additionalProperties": true })
}

fn any_text(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string" })
}

const fn body(schema: SchemaOf, example: &'static str) -> Body {
    Body { schema, example }
}

/// An operation that takes nothing, answers nothing, and is always possible.
const BARE: Operation = Operation {
    method: "GET",
    path: "",
    id: "",
    summary: "",
    more: "",
    when: Always,
    body: None,
    answers: DONE,
    deprecation: false,
    extension: false,
};

/// Every operation, in the order in which a newcomer would read them.
pub(crate) const OPERATIONS: &[Operation] = &[
    Operation {
        path: "/",
        id: "describeInstance",
        summary: "Describe the microVM and its state",
        answers: &[json(of::<InstanceInfo>, "The microVM.")],
        ..BARE
    },
    Operation {
        path: "/version",
        id: "getFirecrackerVersion",
        summary: "Tell the version of Firecracker whose API this is",
        answers: &[json(of::<Version>, "The version.")],
        ..BARE
    },
    Operation {
        path: "/openapi.json",
        id: "getOpenApi",
        summary: "Describe the API: this description",
        answers: &[json(any_object, "The description, in OpenAPI 3.1.")],
        extension: true,
        ..BARE
    },
    Operation {
        path: "/machine-config",
        id: "getMachineConfiguration",
        summary: "Show the settings of processors and memory",
        answers: &[json(of::<MachineConfig>, "The settings, with defaults.")],
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/machine-config",
        id: "putMachineConfiguration",
        summary: "Set processors and memory",
        more: "Fields that are not given return to their defaults.",
        when: BeforeStart,
        body: Some(body(of::<MachineConfig>, r#"{"vcpu_count": 2, "mem_size_mib": 256}"#)),
        deprecation: true,
        ..BARE
    },
    Operation {
        method: "PATCH",
        path: "/machine-config",
        id: "patchMachineConfiguration",
        summary: "Change processors and memory",
        more: "Fields that are not given stay. At least one must be given.",
        when: BeforeStart,
        body: Some(body(of::<MachineConfigUpdate>, r#"{"mem_size_mib": 512}"#)),
        deprecation: true,
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/cpu-config",
        id: "putCpuConfiguration",
        summary: "Set a custom CPU template",
        more: "It replaces an earlier one, also a static template. An empty one changes nothing of the CPU.",
        when: BeforeStart,
        body: Some(body(
            of::<CpuConfig>,
            r#"{"kvm_capabilities": ["121"],
                "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x0", "flags": 1,
                "modifiers": [{"register": "ebx", "bitmap": "0bxxxxxxxxxxxxxxx0xxxxxxxxxxxxxxxx"}]}],
                "msr_modifiers": [{"addr": "0x10a", "bitmap": "0bxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx0"}]}"#,
        )),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/boot-source",
        id: "putGuestBootSource",
        summary: "Set the kernel, the initrd and the kernel command line",
        more: "The files are opened now.",
        when: BeforeStart,
        body: Some(body(
            of::<BootSource>,
            r#"{"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0"}"#,
        )),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/logger",
        id: "putLogger",
        summary: "Configure the monitor's log",
        when: BeforeStart,
        body: Some(body(of::<Logger>, r#"{"log_path": "vm.log", "level": "Debug"}"#)),
        ..BARE
    },
    Operation {
        path: "/metrics",
        id: "getMetrics",
        summary: "Show all counters as Prometheus text",
        answers: &[text("text/plain", "The counters, in Prometheus' text format 0.0.4.")],
        extension: true,
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/metrics",
        id: "putMetrics",
        summary: "Set where lines of metrics go",
        more: "Possible once.",
        when: BeforeStart,
        body: Some(body(of::<Metrics>, r#"{"metrics_path": "vm.metrics"}"#)),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/serial",
        id: "putSerialDevice",
        summary: "Set where the output of the serial console goes",
        more: "The file is opened now.",
        when: BeforeStart,
        body: Some(body(of::<Serial>, r#"{"serial_out_path": "console.log"}"#)),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/drives/{drive_id}",
        id: "putGuestDriveByID",
        summary: "Add a drive, or replace the one with this id",
        more: "The id in the path and the one in the body must be the same. The disk is opened now.",
        when: BeforeStart,
        body: Some(body(
            of::<Drive>,
            r#"{"drive_id": "rootfs", "is_root_device": true, "path_on_host": "rootfs.ext4"}"#,
        )),
        ..BARE
    },
    Operation {
        method: "PATCH",
        path: "/drives/{drive_id}",
        id: "patchGuestDriveByID",
        summary: "Change the disk, the overlay or the rate limits of a drive",
        more: "Fields that are not given stay. At least one must be given besides the id.",
        when: AfterStart,
        body: Some(body(of::<DriveUpdate>, r#"{"drive_id": "data", "path_on_host": "other.img"}"#)),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/network-interfaces/{iface_id}",
        id: "putGuestNetworkInterfaceByID",
        summary: "Add a network interface, or replace the one with this id",
        more: "The id in the path and the one in the body must be the same. The tap is opened now.",
        when: BeforeStart,
        body: Some(body(of::<NetworkInterface>, r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#)),
        ..BARE
    },
    Operation {
        method: "PATCH",
        path: "/network-interfaces/{iface_id}",
        id: "patchGuestNetworkInterfaceByID",
        summary: "Change the rate limits of a network interface",
        when: AfterStart,
        body: Some(body(
            of::<NetworkInterfaceUpdate>,
            r#"{"iface_id": "eth0", "rx_rate_limiter": {"ops": {"size": 1000, "refill_time": 100}}}"#,
        )),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/entropy",
        id: "putEntropyDevice",
        summary: "Add or replace the entropy device",
        when: BeforeStart,
        body: Some(body(of::<Entropy>, "{}")),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/vsock",
        id: "putGuestVsock",
        summary: "Add or replace the vsock device",
        more: "Its sockets are created now.",
        when: BeforeStart,
        body: Some(body(of::<Vsock>, r#"{"guest_cid": 3, "uds_path": "v.sock"}"#)),
        deprecation: true,
        ..BARE
    },
    Operation {
        path: "/mmds",
        id: "getMmds",
        summary: "Show the contents of the metadata service",
        more: "After the start, only if the guest can reach the service.",
        answers: &[json(any_object, "The contents.")],
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/mmds",
        id: "putMmds",
        summary: "Replace the contents of the metadata service",
        more: "After the start, only if the guest can reach the service.",
        body: Some(body(any_object, r#"{"latest": {"meta-data": {"ami-id": "ami-1"}}}"#)),
        answers: METADATA_DONE,
        ..BARE
    },
    Operation {
        method: "PATCH",
        path: "/mmds",
        id: "patchMmds",
        summary: "Merge into the contents of the metadata service (RFC 7396)",
        more: "Only after a `PUT`. After the start, only if the guest can reach the service.",
        body: Some(body(any_object, r#"{"latest": {"meta-data": {"ami-id": null}}}"#)),
        answers: METADATA_DONE,
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/mmds/config",
        id: "putMmdsConfig",
        summary: "Set how the guest reaches the metadata service",
        when: BeforeStart,
        body: Some(body(of::<MmdsConfig>, r#"{"version": "V2", "network_interfaces": ["eth0"]}"#)),
        deprecation: true,
        ..BARE
    },
    Operation {
        path: "/events",
        id: "watchEvents",
        summary: "Watch what happens to the microVM",
        more: "The answer is a stream of server-sent events, which ends with the process. A client that \
               sends `Last-Event-ID` gets what it missed.",
        answers: &[text("text/event-stream", "The events.")],
        extension: true,
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/actions",
        id: "createSyncAction",
        summary: "Start the microVM, or act on the started one",
        more: "`InstanceStart` is possible before the start, the other actions after it.",
        body: Some(body(of::<Action>, r#"{"action_type": "InstanceStart"}"#)),
        ..BARE
    },
    Operation {
        method: "PATCH",
        path: "/vm",
        id: "patchVm",
        summary: "Pause or resume the microVM",
        when: AfterStart,
        body: Some(body(of::<Vm>, r#"{"state": "Paused"}"#)),
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/snapshot/create",
        id: "createSnapshot",
        summary: "Save the microVM to two files",
        more: "The microVM must be paused, except for a live snapshot.",
        when: AfterStart,
        body: Some(body(of::<SnapshotCreate>, r#"{"snapshot_path": "vm.state", "mem_file_path": "vm.mem"}"#)),
        answers: &[
            json(of::<SnapshotJob>, "A live snapshot has begun."),
            Answer {
                status: "204",
                description: "The snapshot is complete.",
                media_type: JSON,
                schema: None,
            },
        ],
        ..BARE
    },
    Operation {
        path: "/snapshot/job",
        id: "describeSnapshotJob",
        summary: "Show the progress of a snapshot or load",
        more: "Of the live snapshot that is being written or was written last, or of the other snapshot or \
               load that is carried out at this moment.",
        when: AfterStart,
        answers: &[json(of::<SnapshotJob>, "The job.")],
        extension: true,
        ..BARE
    },
    Operation {
        method: "DELETE",
        path: "/snapshot/job",
        id: "cancelSnapshotJob",
        summary: "Cancel a snapshot or load",
        when: AfterStart,
        extension: true,
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/snapshot/load",
        id: "loadSnapshot",
        summary: "Restore a microVM from a snapshot",
        more: "Only as long as nothing has configured a microVM to boot. Exactly one of `mem_backend` and \
               `mem_file_path` must be given.",
        when: BeforeStart,
        body: Some(body(
            of::<SnapshotLoad>,
            r#"{"snapshot_path": "vm.state", "mem_backend": {"backend_type": "File", "backend_path": "vm.mem"},
                "resume_vm": true}"#,
        )),
        deprecation: true,
        ..BARE
    },
    Operation {
        method: "PUT",
        path: "/fork",
        id: "forkMicroVm",
        summary: "Fork the running microVM into children",
        when: AfterStart,
        body: Some(body(of::<Fork>, r#"{"children": [{"id": "child-1", "api_socket": "child-1.sock"}]}"#)),
        answers: &[json(of::<ForkOutcome>, "At least one child has started.")],
        extension: true,
        ..BARE
    },
    Operation {
        path: "/vm/config",
        id: "getExportVmConfig",
        summary: "Show the whole configuration",
        more: "The answer is a configuration file, once a boot source is set.",
        answers: &[json(of::<FullVmConfig>, "The configuration.")],
        ..BARE
    },
];

impl When {
    /// The sentence that says so.
    pub(crate) fn sentence(self) -> &'static str {
        match self {
            Always => "",
            BeforeStart => "Possible before the start only.",
            AfterStart => "Possible after the start only.",
        }
    }
}
