//! [`route`] finds out what a request asks for, mostly a [`Command`]; [`ENDPOINTS`] is the table of
//! endpoints.
//!
//! Paths are read as Firecracker reads them: several leading slashes count as one, a trailing one
//! is ignored, and so are segments after those that name the endpoint.
//!
//! A body must have the fields and types of its struct. The owner of what a command changes checks
//! bounds, after the phase: so a request in the wrong phase says so, whatever its values.

use config::json_error::describe;
use config::{
    Action, ActionType, ConfigError, Drive, DriveError, DriveUpdate, Fork, IdError, Logger, MachineConfig,
    MachineConfigUpdate, MmdsConfig, MmdsVersion, NetworkError, NetworkInterface, NetworkInterfaceUpdate,
    ResourceId, SnapshotCreate, SnapshotLoad, Unsupported, Vm, Vsock,
};
use serde::de::DeserializeOwned;

use super::endpoints::{self, Endpoint, Target};
use crate::{
    Command,
    http::{Method, Request},
};

/// A request for a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routed {
    /// The command.
    pub command: Command,
    /// Whether the request used a deprecated field. The answer then has a header that says so.
    pub deprecated: bool,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "it is on the stack of one call, and a box would cost more")]
pub enum Route {
    /// A command for the main thread.
    Command(Routed),
    /// The stream of events, which the API thread sends.
    Events,
}

/// Why a request is no command.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// There is no such path, or not with this method.
    #[error("there is no {method} {path} in this API")]
    NotFound {
        /// The method given.
        method: &'static str,
        /// The path given.
        path: String,
    },
    /// An endpoint of Firecracker that this version does not support.
    #[error("{method} {path}: this version does not support {what}")]
    Unsupported {
        /// The method given.
        method: &'static str,
        /// The path given.
        path: String,
        /// What is not supported.
        what: &'static str,
    },
    /// A body where none is expected.
    #[error("{method} {path} takes no body, and this one has {len} bytes")]
    UnexpectedBody {
        /// The method given.
        method: &'static str,
        /// The path given.
        path: String,
        /// The body's length.
        len: usize,
    },
    /// No body where one is required.
    #[error("{method} {path} needs a JSON body, with its Content-Length")]
    MissingBody {
        /// The method given.
        method: &'static str,
        /// The path given.
        path: String,
    },
    /// A body that is not valid JSON for this endpoint.
    #[error("the body of {method} {path} cannot be read: {reason}")]
    BadBody {
        /// The method given.
        method: &'static str,
        /// The path given.
        path: String,
        /// The field, its line and column, and what is wrong.
        reason: String,
    },
    /// An update without any field.
    #[error("PATCH {path} names no field to change")]
    EmptyUpdate {
        /// The path given.
        path: String,
    },
    /// A value out of bounds.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An id in the path that is not well-formed.
    #[error("the path names no resource: {0}")]
    Id(#[from] IdError),
}

/// Turns a request into its command. The text is the part of the path that stands for the
/// endpoint's parameter, empty if it has none.
pub type Read = fn(&Request, &str) -> Result<Routed, RouteError>;

/// Every endpoint. A row here needs a row in `xtask/openapi/src/operations.rs`.
pub const ENDPOINTS: &[Endpoint<Read>] = &[
    Endpoint::get("/", |request, _| question(request, Command::DescribeInstance)),
    Endpoint::get("/version", |request, _| question(request, Command::GetVersion)),
    Endpoint::get("/openapi.json", |request, _| question(request, Command::GetOpenApi)),
    Endpoint::get("/machine-config", |request, _| question(request, Command::GetMachineConfig)),
    Endpoint::put("/machine-config", |request, _| put_machine_config(request)),
    Endpoint::patch("/machine-config", |request, _| patch_machine_config(request)),
    Endpoint::put("/cpu-config", |request, _| Ok(plain(Command::PutCpuConfig(body(request)?)))),
    Endpoint::put("/boot-source", |request, _| Ok(plain(Command::PutBootSource(body(request)?)))),
    Endpoint::put("/logger", |request, _| Ok(plain(Command::PutLogger(body::<Logger>(request)?)))),
    Endpoint::get("/metrics", |request, _| question(request, Command::GetMetrics)),
    Endpoint::put("/metrics", |request, _| Ok(plain(Command::PutMetrics(body(request)?)))),
    Endpoint::put("/serial", |request, _| Ok(plain(Command::PutSerial(body(request)?)))),
    Endpoint::put("/drives/{drive_id}", put_drive),
    Endpoint::patch("/drives/{drive_id}", patch_drive),
    Endpoint::put("/network-interfaces/{iface_id}", put_network),
    Endpoint::patch("/network-interfaces/{iface_id}", patch_network),
    Endpoint::put("/entropy", |request, _| Ok(plain(Command::PutEntropy(body(request)?)))),
    Endpoint::put("/vsock", |request, _| put_vsock(request)),
    Endpoint::get("/mmds", |request, _| question(request, Command::GetMmds)),
    Endpoint {
        exact: true,
        ..Endpoint::put("/mmds", |request, _| Ok(plain(Command::PutMmds(body(request)?))))
    },
    Endpoint::patch("/mmds", |request, _| Ok(plain(Command::PatchMmds(body(request)?)))),
    Endpoint::put("/mmds/config", |request, _| put_mmds_config(request)),
    Endpoint::events("/events"),
    Endpoint::put("/actions", |request, _| put_action(request)),
    Endpoint::patch("/vm", |request, _| Ok(plain(Command::SetVmState(body::<Vm>(request)?.state)))),
    Endpoint::put("/snapshot/create", |request, _| put_snapshot_create(request)),
    Endpoint::get("/snapshot/job", |request, _| question(request, Command::DescribeJob)),
    Endpoint::delete("/snapshot/job", |request, _| question(request, Command::CancelJob)),
    Endpoint::put("/snapshot/load", |request, _| put_snapshot_load(request)),
    Endpoint::put("/fork", |request, _| put_fork(request)),
    Endpoint::get("/vm/config", |request, _| question(request, Command::GetVmConfig)),
];

/// Finds out what `request` asks for.
pub fn route(request: &Request) -> Result<Route, RouteError> {
    let Some(path) = request.path.strip_prefix('/') else { return Err(not_found(request)) };
    let segments: Vec<&str> = path.trim_start_matches('/').split_terminator('/').collect();
    match endpoints::find(ENDPOINTS, request.method, &segments) {
        Some(endpoint) => match endpoint.target {
            Target::Command(read) => read(request, endpoint.parameter(&segments)).map(Route::Command),
            Target::Events => check_no_body(request).map(|()| Route::Events),
        },
        None => Err(unsupported(request, &segments).unwrap_or_else(|| not_found(request))),
    }
}

/// The error for an endpoint that Firecracker has and this version does not.
fn unsupported(request: &Request, segments: &[&str]) -> Option<RouteError> {
    let what = match (request.method, segments) {
        (_, ["balloon", ..]) => Unsupported::Balloon.description(),
        (_, ["pmem", ..]) => Unsupported::Pmem.description(),
        (_, ["hotplug", "memory", ..]) => Unsupported::MemoryHotplug.description(),
        (Method::Delete, ["drives" | "network-interfaces", _, ..]) => "hot-unplug",
        _ => return None,
    };
    let (method, path) = name(request);
    Some(RouteError::Unsupported { method, path, what })
}

fn put_machine_config(request: &Request) -> Result<Routed, RouteError> {
    let config: MachineConfig = body(request)?;
    Ok(Routed { deprecated: config.cpu_template.is_some(), command: Command::PutMachineConfig(config) })
}

fn patch_machine_config(request: &Request) -> Result<Routed, RouteError> {
    let update: MachineConfigUpdate = body(request)?;
    if update.is_empty() {
        return Err(RouteError::EmptyUpdate { path: request.path.clone() });
    }
    Ok(Routed { deprecated: update.cpu_template.is_some(), command: Command::PatchMachineConfig(update) })
}

fn put_drive(request: &Request, id: &str) -> Result<Routed, RouteError> {
    let drive: Drive = body(request)?;
    check_drive_id(id, &drive.drive_id)?;
    Ok(plain(Command::PutDrive(drive)))
}

fn patch_drive(request: &Request, id: &str) -> Result<Routed, RouteError> {
    let update: DriveUpdate = body(request)?;
    check_drive_id(id, &update.drive_id)?;
    Ok(plain(Command::PatchDrive(update)))
}

fn put_network(request: &Request, id: &str) -> Result<Routed, RouteError> {
    let network: NetworkInterface = body(request)?;
    check_iface_id(id, &network.iface_id)?;
    Ok(plain(Command::PutNetwork(network)))
}

fn patch_network(request: &Request, id: &str) -> Result<Routed, RouteError> {
    let update: NetworkInterfaceUpdate = body(request)?;
    check_iface_id(id, &update.iface_id)?;
    Ok(plain(Command::PatchNetwork(update)))
}

fn put_vsock(request: &Request) -> Result<Routed, RouteError> {
    let vsock: Vsock = body(request)?;
    Ok(Routed { deprecated: vsock.vsock_id.is_some(), command: Command::PutVsock(vsock) })
}

fn put_mmds_config(request: &Request) -> Result<Routed, RouteError> {
    let config: MmdsConfig = body(request)?;
    Ok(Routed { deprecated: config.version == MmdsVersion::V1, command: Command::PutMmdsConfig(config) })
}

fn put_snapshot_create(request: &Request) -> Result<Routed, RouteError> {
    let create: SnapshotCreate = body(request)?;
    create.check()?;
    Ok(plain(Command::CreateSnapshot(create)))
}

fn put_snapshot_load(request: &Request) -> Result<Routed, RouteError> {
    let mut load: SnapshotLoad = body(request)?;
    let deprecated = load.resolve_deprecated();
    load.check()?;
    Ok(Routed { deprecated, command: Command::LoadSnapshot(load) })
}

fn put_fork(request: &Request) -> Result<Routed, RouteError> {
    let fork: Fork = body(request)?;
    fork.check()?;
    Ok(plain(Command::Fork(fork)))
}

/// Checks that the id in the path is well-formed, and that it is the body's.
fn check_drive_id(path: &str, body: &str) -> Result<(), RouteError> {
    check_id(path, body, |path, body| DriveError::IdMismatch { body, path })
}

fn check_iface_id(path: &str, body: &str) -> Result<(), RouteError> {
    check_id(path, body, |path, body| NetworkError::IdMismatch { body, path })
}

fn check_id<E: Into<ConfigError>>(
    path: &str,
    body: &str,
    other: fn(String, String) -> E,
) -> Result<(), RouteError> {
    path.parse::<ResourceId>()?;
    if path == body {
        return Ok(());
    }
    Err(other(path.to_owned(), body.to_owned()).into().into())
}

fn put_action(request: &Request) -> Result<Routed, RouteError> {
    Ok(plain(match body::<Action>(request)?.action_type {
        ActionType::InstanceStart => Command::Start,
        ActionType::FlushMetrics => Command::FlushMetrics,
        ActionType::SendCtrlAltDel => Command::SendCtrlAltDel,
    }))
}

/// A command without deprecated fields.
fn plain(command: Command) -> Routed {
    Routed { command, deprecated: false }
}

/// A command whose request must have no body.
fn question(request: &Request, command: Command) -> Result<Routed, RouteError> {
    check_no_body(request).map(|()| plain(command))
}

fn check_no_body(request: &Request) -> Result<(), RouteError> {
    if request.body.is_empty() {
        return Ok(());
    }
    let (method, path) = name(request);
    Err(RouteError::UnexpectedBody { method, path, len: request.body.len() })
}

/// Parses the body of a request that must have one.
fn body<T: DeserializeOwned>(request: &Request) -> Result<T, RouteError> {
    let (method, path) = name(request);
    if request.body.is_empty() {
        return Err(RouteError::MissingBody { method, path });
    }
    serde_json::from_slice(&request.body).map_err(|error| {
        // The log has the reason. Names of metadata may be secret.
        let segments = path.trim_start_matches('/');
        let is_config = request.method == Method::Put && segments.starts_with("mmds/config");
        let is_metadata = segments.starts_with("mmds") && !is_config;
        let reason = if is_metadata { error.to_string() } else { describe(&request.body, &error) };
        RouteError::BadBody { method, path, reason }
    })
}

fn not_found(request: &Request) -> RouteError {
    let (method, path) = name(request);
    RouteError::NotFound { method, path }
}

fn name(request: &Request) -> (&'static str, String) {
    (request.method.name(), request.path.clone())
}

#[cfg(test)]
mod tests {
    use config::{
        Absent, AbsentList, BootSource, CpuConfig, CpuConfigSource, CpuTemplate, FullVmConfig, HugePages,
        LogLevel, Serial, TokenBucket, VmConfig, VmState,
    };
    use proptest::prelude::*;

    use super::*;

    fn request(method: Method, path: &str, body: &str) -> Request {
        Request { method, path: path.into(), body: body.into(), last_event_id: None }
    }

    #[test]
    fn only_get_asks_for_events_and_without_a_body() {
        let asks = |method, path, body| route(&request(method, path, body));
        for path in ["/events", "//events/", "/events/x"] {
            assert_eq!(asks(Method::Get, path, "").unwrap(), Route::Events, "{path}");
        }
        for (method, path) in [(Method::Put, "/events"), (Method::Get, "/event"), (Method::Get, "events")] {
            assert!(refusal(method, path, "").contains("there is no"), "{path}");
        }
        assert!(refusal(Method::Get, "/events", "{}").contains("takes no body"));
    }

    fn read(method: Method, path: &str, body: &str) -> Routed {
        match route(&request(method, path, body)) {
            Ok(Route::Command(routed)) => routed,
            other => panic!("{other:?}"),
        }
    }

    fn command(method: Method, path: &str, body: &str) -> Command {
        read(method, path, body).command
    }

    fn refusal(method: Method, path: &str, body: &str) -> String {
        route(&request(method, path, body)).unwrap_err().to_string()
    }

    #[test]
    fn get_requests_become_commands() {
        for (path, expected) in [
            ("/", Command::DescribeInstance),
            ("/version", Command::GetVersion),
            ("/machine-config", Command::GetMachineConfig),
            ("/vm/config", Command::GetVmConfig),
            ("/openapi.json", Command::GetOpenApi),
        ] {
            assert_eq!(command(Method::Get, path, ""), expected);
        }
    }

    #[test]
    fn put_machine_config_reads_all_fields() {
        let body = r#"{"vcpu_count":4,"mem_size_mib":512,"smt":true,"track_dirty_pages":true,
            "huge_pages":"2M","gdb_socket_path":"/run/gdb"}"#;
        let expected = MachineConfig {
            vcpu_count: 4,
            mem_size_mib: 512,
            smt: true,
            cpu_template: None,
            track_dirty_pages: true,
            huge_pages: HugePages::Hugetlbfs2M,
            gdb_socket_path: Some("/run/gdb".into()),
        };
        assert_eq!(command(Method::Put, "/machine-config", body), Command::PutMachineConfig(expected));
    }

    #[test]
    fn patch_machine_config_must_not_be_empty() {
        let expected = MachineConfigUpdate { vcpu_count: Some(2), ..MachineConfigUpdate::default() };
        assert_eq!(
            command(Method::Patch, "/machine-config", r#"{"vcpu_count":2}"#),
            Command::PatchMachineConfig(expected)
        );
        let error = refusal(Method::Patch, "/machine-config", "{}");
        assert!(error.contains("PATCH /machine-config"), "{error}");
    }

    #[test]
    fn only_cpu_template_is_deprecated_in_machine_config() {
        let put = r#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":"T2"}"#;
        let routed = read(Method::Put, "/machine-config", put);
        assert!(routed.deprecated);
        let Command::PutMachineConfig(config) = routed.command else { panic!() };
        assert_eq!(config.cpu_template, Some(CpuTemplate::T2));
        let patch = r#"{"cpu_template":"None"}"#;
        assert!(read(Method::Patch, "/machine-config", patch).deprecated);
        let put = r#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":null}"#;
        assert!(!read(Method::Put, "/machine-config", put).deprecated);
    }

    #[test]
    fn put_cpu_config_reads_a_template() {
        let empty = Command::PutCpuConfig(CpuConfig::default());
        assert_eq!(command(Method::Put, "/cpu-config", "{}"), empty);
        let body = r#"{"msr_modifiers":[{"addr":"0x8b","bitmap":"0b1x"}]}"#;
        let Command::PutCpuConfig(template) = command(Method::Put, "/cpu-config", body) else { panic!() };
        assert_eq!(template.msr_modifiers[0].addr, 0x8b);
        let body = r#"{"cpuid_modifiers":[{"leaf":"1","subleaf":"0x0","flags":0,"modifiers":[]}]}"#;
        assert!(refusal(Method::Put, "/cpu-config", body).contains("leaf is \"1\""));
        assert!(refusal(Method::Put, "/cpu-config", "null").contains("cannot be read"));
        assert!(refusal(Method::Get, "/cpu-config", "").contains("there is no GET /cpu-config"));
    }

    #[test]
    fn put_boot_source_reads_all_fields() {
        let body = r#"{"kernel_image_path":"vmlinux","initrd_path":"initrd","boot_args":"quiet"}"#;
        let expected = BootSource {
            kernel_image_path: "vmlinux".into(),
            initrd_path: Some("initrd".into()),
            boot_args: Some("quiet".into()),
        };
        assert_eq!(command(Method::Put, "/boot-source", body), Command::PutBootSource(expected));
    }

    #[test]
    fn put_logger_reads_all_fields() {
        let body =
            r#"{"log_path":"log","level":"warn","show_level":true,"show_log_origin":false,"module":"m"}"#;
        let expected = Logger {
            log_path: Some("log".into()),
            level: Some(LogLevel::Warning),
            show_level: Some(true),
            show_log_origin: Some(false),
            module: Some("m".into()),
        };
        assert_eq!(command(Method::Put, "/logger", body), Command::PutLogger(expected));
    }

    #[test]
    fn put_serial_reads_all_fields() {
        let body = r#"{"serial_out_path":"out","rate_limiter":{"size":1,"refill_time":2}}"#;
        let bucket = TokenBucket { size: 1, one_time_burst: None, refill_time: 2 };
        let expected = Serial { serial_out_path: Some("out".into()), rate_limiter: Some(bucket) };
        assert_eq!(command(Method::Put, "/serial", body), Command::PutSerial(expected));
    }

    #[test]
    fn put_vsock_reads_all_fields_and_its_id_is_deprecated() {
        let body = r#"{"guest_cid":3,"uds_path":"/v.sock"}"#;
        let expected =
            Vsock { guest_cid: 3, uds_path: "/v.sock".into(), vsock_id: None, seqpacket_uds_path: None };
        assert_eq!(command(Method::Put, "/vsock", body), Command::PutVsock(expected));
        let body = r#"{"guest_cid":0,"uds_path":"/v.sock","vsock_id":"root"}"#;
        assert!(read(Method::Put, "/vsock", body).deprecated);
    }

    #[test]
    fn mmds_requests_become_commands() {
        assert_eq!(command(Method::Get, "/mmds", ""), Command::GetMmds);
        let contents = serde_json::json!({"a":{"b":null}});
        let body = contents.to_string();
        assert_eq!(command(Method::Put, "/mmds", &body), Command::PutMmds(contents.clone()));
        assert_eq!(command(Method::Patch, "/mmds", &body), Command::PatchMmds(contents));
    }

    #[test]
    fn mmds_version_1_is_deprecated() {
        for (version, deprecated) in [(r#","version":"V1""#, true), ("", true), (r#","version":"V2""#, false)]
        {
            let body = format!(r#"{{"network_interfaces":["eth0"]{version}}}"#);
            let routed = read(Method::Put, "/mmds/config", &body);
            assert_eq!(routed.deprecated, deprecated, "{version}");
            assert!(matches!(routed.command, Command::PutMmdsConfig(_)));
        }
    }

    #[test]
    fn actions_become_commands() {
        for (action, expected) in [
            ("InstanceStart", Command::Start),
            ("FlushMetrics", Command::FlushMetrics),
            ("SendCtrlAltDel", Command::SendCtrlAltDel),
        ] {
            let body = format!(r#"{{"action_type":"{action}"}}"#);
            assert_eq!(command(Method::Put, "/actions", &body), expected);
        }
    }

    #[test]
    fn patch_vm_pauses_and_resumes() {
        for (state, expected) in [("Paused", VmState::Paused), ("Resumed", VmState::Resumed)] {
            let body = format!(r#"{{"state":"{state}"}}"#);
            assert_eq!(command(Method::Patch, "/vm", &body), Command::SetVmState(expected));
        }
    }

    #[test]
    fn unknown_requests_are_named_with_method_and_path() {
        for (method, path) in [
            (Method::Get, "/nowhere"),
            (Method::Delete, "/machine-config"),
            (Method::Patch, "/boot-source"),
            (Method::Get, "/vm"),
            (Method::Get, "/vm//config"),
            (Method::Put, "/mmds/other"),
            (Method::Get, "/snapshot"),
            (Method::Get, "/version?x=1"),
            (Method::Get, "*"),
        ] {
            let error = refusal(method, path, "{}");
            assert!(error.contains(&format!("{} {path} ", method.name())), "{error}");
        }
    }

    #[test]
    fn extra_slashes_and_segments_are_ignored() {
        for (path, expected) in [
            ("//", Command::DescribeInstance),
            ("//version", Command::GetVersion),
            ("/version/", Command::GetVersion),
            ("/machine-config/x/y", Command::GetMachineConfig),
            ("///vm/config/x", Command::GetVmConfig),
            ("/mmds/config", Command::GetMmds),
        ] {
            assert_eq!(command(Method::Get, path, ""), expected, "{path}");
        }
        let vsock = command(Method::Put, "/vsock/vsock0", r#"{"guest_cid":3,"uds_path":"/v"}"#);
        assert!(matches!(vsock, Command::PutVsock(_)));
        let drive = r#"{"drive_id":"a","is_root_device":false,"path_on_host":"d"}"#;
        assert!(matches!(command(Method::Put, "/drives/a/x", drive), Command::PutDrive(_)));
        for path in ["/drives//a", "/drives/", "/drives"] {
            assert!(refusal(Method::Put, path, drive).contains("the id is empty"), "{path}");
        }
    }

    #[test]
    fn endpoints_of_missing_devices_say_what_is_missing() {
        for (method, path, what) in [
            (Method::Put, "/balloon", "balloon devices"),
            (Method::Get, "/balloon/statistics", "balloon devices"),
            (Method::Patch, "/balloon/hinting/start", "balloon devices"),
            (Method::Put, "/pmem/p0", "pmem devices"),
            (Method::Delete, "/pmem/p0", "pmem devices"),
            (Method::Put, "/hotplug/memory", "memory hot-plug"),
            (Method::Delete, "/drives/a", "hot-unplug"),
            (Method::Delete, "/network-interfaces/a", "hot-unplug"),
        ] {
            let error = refusal(method, path, "{}");
            let expected = format!("{} {path}: this version does not support {what}", method.name());
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn put_needs_a_body_and_get_must_not_have_one() {
        for (method, path) in [
            (Method::Put, "/machine-config"),
            (Method::Patch, "/machine-config"),
            (Method::Put, "/boot-source"),
            (Method::Put, "/logger"),
            (Method::Put, "/serial"),
            (Method::Put, "/actions"),
            (Method::Patch, "/vm"),
            (Method::Put, "/mmds"),
            (Method::Patch, "/mmds"),
            (Method::Put, "/mmds/config"),
        ] {
            assert!(refusal(method, path, "").contains("needs a JSON body"), "{path}");
        }
        for path in ["/", "/version", "/machine-config", "/vm/config", "/mmds"] {
            assert!(refusal(Method::Get, path, "{}").contains("takes no body"), "{path}");
        }
    }

    #[test]
    fn malformed_body_is_refused_with_field_line_and_column() {
        let error = refusal(Method::Put, "/machine-config", "{\n\"vcpu_count\":1,\n\"cpus\":2}");
        assert!(error.contains("`cpus`") && error.contains("line 3 column"), "{error}");
        let error = refusal(Method::Put, "/machine-config", r#"{"mem_size_mib":128}"#);
        assert!(error.contains("missing field `vcpu_count` at line 1 column 20"), "{error}");
        let error = refusal(Method::Put, "/actions", r#"{"action_type":"InstanceStart"} {}"#);
        assert!(error.contains("trailing characters"), "{error}");
    }

    /// The commands that set a microVM up as its `GET /vm/config` says.
    fn commands_of(shown: &serde_json::Value) -> Vec<Command> {
        let sections = shown.as_object().unwrap().iter();
        let puts = sections.flat_map(|(section, value)| match (section.as_str(), value) {
            (_, serde_json::Value::Null) => Vec::new(),
            ("drives", drives) => named(section, drives, "drive_id"),
            ("network-interfaces", networks) => named(section, networks, "iface_id"),
            ("mmds-config", config) => vec![("/mmds/config".to_owned(), config.clone())],
            ("pmem", list) => {
                assert_eq!(list, &serde_json::json!([]));
                Vec::new()
            }
            (section, value) => vec![(format!("/{section}"), value.clone())],
        });
        puts.map(|(path, body)| command(Method::Put, &path, &body.to_string())).collect()
    }

    fn named(section: &str, list: &serde_json::Value, id: &str) -> Vec<(String, serde_json::Value)> {
        let items = list.as_array().unwrap().iter();
        items.map(|item| (format!("/{section}/{}", item[id].as_str().unwrap()), item.clone())).collect()
    }

    proptest! {
        #[test]
        fn shown_configuration_is_accepted_by_puts(config in config::testing::vm_config()) {
            let shown = serde_json::to_value(FullVmConfig::from(config.clone())).unwrap();
            let commands = commands_of(&shown);
            let VmConfig {
                boot_source, machine_config, logger, serial, drives, entropy, vsock, mmds_config, network_interfaces,
                balloon: Absent, cpu_config, memory_hotplug: Absent, metrics, pmem: AbsentList,
            } = config;
            let expected: Vec<Command> = [Command::PutBootSource(boot_source)]
                .into_iter()
                .chain(cpu_config.and_then(CpuConfigSource::inline).map(Command::PutCpuConfig))
                .chain(drives.into_iter().map(Command::PutDrive))
                .chain(entropy.map(Command::PutEntropy))
                .chain(logger.map(Command::PutLogger))
                .chain([Command::PutMachineConfig(machine_config)])
                .chain(metrics.map(Command::PutMetrics))
                .chain(mmds_config.map(Command::PutMmdsConfig))
                .chain(network_interfaces.into_iter().map(Command::PutNetwork))
                .chain(serial.map(Command::PutSerial))
                .chain(vsock.map(Command::PutVsock))
                .collect();
            prop_assert_eq!(commands, expected);
        }

        #[test]
        fn no_request_makes_routing_panic(
            method in prop::sample::select(vec![Method::Get, Method::Put, Method::Patch, Method::Delete]),
            path in prop_oneof![
                "\\PC*",
                prop::sample::select(vec!["/machine-config", "/boot-source", "/logger", "/serial", "/actions", "/vm"])
                    .prop_map(str::to_owned),
            ],
            body in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..64),
                "[\\[{\"]{0,200}".prop_map(String::into_bytes),
            ],
        ) {
            let _ = route(&Request { method, path, body, last_event_id: None });
        }
    }
}
