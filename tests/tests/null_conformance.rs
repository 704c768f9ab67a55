//! Every operation and every field of Firecracker's API description, against the real binary:
//! accepted in its phase, refused outside of it, and refused by name if it breaks a rule.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::conformance::{BadBody, Description, Operation};
use vesta_tests::counting;
use vesta_tests::disks::disk;
use vesta_tests::guest::{TIMEOUT, start, vmm_path};
use vesta_tests::host_net::HostNet;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// When an operation is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    BeforeStart,
    AfterStart,
    Always,
    /// Of a device that is not supported.
    Never,
}

fn phase(operation: &Operation) -> Phase {
    let (method, path) = (operation.method.as_str(), operation.path.as_str());
    match (method, path) {
        (_, path) if ["/balloon", "/pmem", "/hotplug"].iter().any(|device| path.starts_with(device)) => {
            Phase::Never
        }
        ("GET", _) | (_, "/mmds") => Phase::Always,
        ("PATCH", "/machine-config") => Phase::BeforeStart,
        ("PATCH", _) | (_, "/snapshot/create") => Phase::AfterStart,
        _ => Phase::BeforeStart,
    }
}

/// Whether an operation needs the tap of the test's network.
fn needs_network(operation: &Operation) -> bool {
    operation.path.starts_with("/network-interfaces") || operation.path == "/mmds/config"
}

/// A rule of the description that vesta has on purpose not, by field and rule; see
/// docs/compatibility.md.
const OTHER_RULES: [(&str, &str); 3] = [
    // Up to 128.
    ("MachineConfiguration.vcpu_count", "maximum"),
    // Clients send 0.
    ("Vsock.guest_cid", "minimum"),
    // An interface may get another backend than a tap.
    ("NetworkOverride.host_dev_name", "missing"),
];

/// Fields that exclude others of the same body.
const EXCLUSIVE: [&str; 3] = ["Drive.socket", "SnapshotLoadParams.mem_file_path", "CpuConfig.reg_modifiers"];
/// Fields of other architectures and devices.
const NOT_HERE: [&str; 1] = ["CpuConfig.vcpu_features"];

/// The description, and a valid body of each operation with all its fields.
struct Setup {
    api: Description,
    bodies: BTreeMap<&'static str, Value>,
    /// Removed at the end.
    _home: tempfile::TempDir,
    net: Option<HostNet>,
}

impl Setup {
    fn new() -> Result<Setup> {
        let home = tempfile::tempdir()?;
        // Taps need root; without it, network interfaces are left out.
        let net = if rustix::process::geteuid().is_root() { Some(HostNet::new()?) } else { None };
        if let Some(net) = &net {
            net.tap("tap0", "", "")?;
            net.tap("tap1", "", "")?;
        }
        let bodies = bodies(home.path())?;
        Ok(Setup { api: Description::firecracker()?, bodies, _home: home, net })
    }

    /// The operations that a test can send, with their bodies.
    fn operations<'a>(
        &'a self,
        phases: &'a [Phase],
    ) -> impl Iterator<Item = (&'a Operation, Option<&'a Value>)> {
        let of_phase = self.api.operations.iter().filter(|operation| phases.contains(&phase(operation)));
        let possible = of_phase.filter(|operation| self.net.is_some() || !needs_network(operation));
        possible.map(|operation| {
            let name = format!("{} {}", operation.method, operation.path);
            (operation, self.bodies.get(name.as_str()))
        })
    }

    /// A monitor that has a body of each operation before the start but the start itself.
    fn configured(&self) -> Result<(Vmm, ApiClient)> {
        let vmm = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        let mut operations: Vec<_> = self.operations(&[Phase::BeforeStart]).collect();
        operations
            .retain(|(operation, _)| !["/actions", "/snapshot/load"].contains(&operation.path.as_str()));
        // It names interfaces that must be there.
        operations.sort_by_key(|(operation, _)| operation.path == "/mmds/config");
        for (operation, body) in operations {
            send(&mut api, operation, body)?.ok().with_context(|| format!("{operation:?}"))?;
        }
        let contents = json!({"latest": {"meta-data": {}}});
        api.put("/mmds", &contents)?.ok()?;
        Ok((vmm, api))
    }
}

/// A valid body for each operation that has one.
fn bodies(home: &Path) -> Result<BTreeMap<&'static str, Value>> {
    let kernel = home.join("kernel");
    std::fs::write(&kernel, counting::kernel().bytes())?;
    let initrd = home.join("initrd");
    std::fs::write(&initrd, [0; 512])?;
    let disk = disk(home, "disk", 1)?;
    let bucket = json!({"size": 1 << 30, "refill_time": 100, "one_time_burst": 0});
    let limits = json!({"bandwidth": bucket, "ops": bucket});
    let machine = json!({
        "vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": true, "huge_pages": "None",
        "cpu_template": "None"
    });
    Ok(BTreeMap::from([
        ("PUT /actions", json!({"action_type": "InstanceStart"})),
        (
            "PUT /boot-source",
            json!({"kernel_image_path": kernel, "initrd_path": initrd, "boot_args": "console=ttyS0"}),
        ),
        ("PUT /cpu-config", json!({"kvm_capabilities": [], "cpuid_modifiers": [], "msr_modifiers": []})),
        (
            "PUT /drives/{drive_id}",
            json!({
                "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
                "partuuid": "0eaa91a0-01", "cache_type": "Unsafe", "io_engine": "Sync", "rate_limiter": limits,
            }),
        ),
        ("PATCH /drives/{drive_id}", json!({"drive_id": "d", "path_on_host": disk, "rate_limiter": limits})),
        (
            "PUT /logger",
            json!({
                "log_path": home.join("log"), "level": "Info", "show_level": true, "show_log_origin": true,
                "module": "a_module"
            }),
        ),
        ("PUT /machine-config", machine.clone()),
        ("PATCH /machine-config", machine),
        (
            "PUT /metrics",
            json!({"metrics_path": home.join("metrics"), "emit_id": true, "properties": {"a": "b"}}),
        ),
        ("PUT /mmds", json!({})),
        ("PATCH /mmds", json!({})),
        (
            "PUT /mmds/config",
            json!({
                "version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.169.250",
                "imds_compat": true
            }),
        ),
        ("PUT /entropy", json!({"rate_limiter": limits})),
        ("PUT /serial", json!({"serial_out_path": home.join("serial"), "rate_limiter": bucket})),
        (
            "PUT /network-interfaces/{iface_id}",
            json!({
                "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01", "mtu": 1500,
                "rx_rate_limiter": limits, "tx_rate_limiter": limits,
            }),
        ),
        (
            "PATCH /network-interfaces/{iface_id}",
            json!({"iface_id": "eth0", "rx_rate_limiter": limits, "tx_rate_limiter": limits}),
        ),
        (
            "PUT /snapshot/create",
            json!({
                "snapshot_path": home.join("state"), "mem_file_path": home.join("memory"), "snapshot_type": "Full"
            }),
        ),
        (
            "PUT /snapshot/load",
            json!({
                "snapshot_path": home.join("state"),
                "mem_backend": {"backend_type": "File", "backend_path": home.join("memory")},
                "enable_diff_snapshots": false, "track_dirty_pages": false, "resume_vm": true,
                "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap1"}],
                "vsock_override": {"uds_path": home.join("loaded.vsock")},
                "clock_realtime": true, "huge_pages": "Snapshot",
            }),
        ),
        ("PATCH /vm", json!({"state": "Paused"})),
        ("PUT /vsock", json!({"guest_cid": 3, "uds_path": home.join("vsock"), "vsock_id": "vsock0"})),
    ]))
}

fn send(
    api: &mut ApiClient,
    operation: &Operation,
    body: Option<&Value>,
) -> Result<vesta_tests::api::Response> {
    let text = body.map(Value::to_string);
    api.request(&operation.method, &path(operation), text.as_deref())
}

/// The path, with the ids of [`bodies`].
fn path(operation: &Operation) -> String {
    operation.path.replace("{drive_id}", "d").replace("{iface_id}", "eth0").replace("{id}", "p")
}

#[test]
fn the_test_bodies_have_all_fields() -> Result<()> {
    let setup = Setup::new()?;
    for (operation, body) in setup.operations(&[Phase::BeforeStart, Phase::AfterStart]) {
        let Some(schema) = &operation.body else { continue };
        let body = body.with_context(|| format!("no body for {operation:?}"))?;
        for field in setup.api.schemas[schema].fields.keys() {
            let name = format!("{schema}.{field}");
            let left_out = EXCLUSIVE.contains(&name.as_str()) || NOT_HERE.contains(&name.as_str());
            ensure!(body.get(field).is_some() != left_out, "{name} in the body of {operation:?}");
        }
    }
    Ok(())
}

#[test]
fn operations_are_accepted_in_their_phase_only() -> Result<()> {
    let setup = Setup::new()?;
    // Before the start: all are accepted by `configured`; those of a started guest are refused.
    let (vmm, mut api) = setup.configured()?;
    for (operation, body) in setup.operations(&[Phase::AfterStart]) {
        let response = send(&mut api, operation, body)?;
        assert_eq!(response.status, 400, "{operation:?}");
        let fault = response.fault();
        ensure!(fault.contains("not supported before starting the microVM"), "{operation:?}: {fault}");
    }
    start(&mut api)?;
    for (operation, body) in setup.operations(&[Phase::BeforeStart]) {
        let response = send(&mut api, operation, body)?;
        assert_eq!(response.status, 400, "{operation:?}");
        let fault = response.fault();
        ensure!(fault.contains("not supported after starting the microVM"), "{operation:?}: {fault}");
    }
    // A snapshot needs a paused guest.
    let (vm, others): (Vec<_>, Vec<_>) =
        setup.operations(&[Phase::AfterStart]).partition(|(operation, _)| operation.path == "/vm");
    for (operation, body) in vm.into_iter().chain(others) {
        let response = send(&mut api, operation, body)?;
        ensure!(response.status == 204, "{operation:?}: {}", response.body);
    }
    drop((vmm, api));

    let mut loaded = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let mut api = loaded.ready_client(TIMEOUT)?;
    let mut body = setup.bodies["PUT /snapshot/load"].clone();
    if setup.net.is_none() {
        body["network_overrides"] = json!([]);
    }
    api.put("/snapshot/load", &body)?.ok()?;
    assert_eq!(api.get("/")?.json()?["state"], "Running");
    ensure!(loaded.is_running()?);
    Ok(())
}

#[test]
fn unsupported_devices_are_refused_by_name() -> Result<()> {
    let setup = Setup::new()?;
    let (_vmm, mut api) = setup.configured()?;
    for started in [false, true] {
        if started {
            start(&mut api)?;
        }
        for (operation, _) in setup.operations(&[Phase::Never]) {
            let body = operation.body.as_ref().map(|_| json!({}));
            let response = send(&mut api, operation, body.as_ref())?;
            assert_eq!(response.status, 400, "{operation:?}");
            ensure!(response.fault().contains("does not support"), "{operation:?}: {}", response.body);
        }
    }
    Ok(())
}

#[test]
fn answers_have_the_fields_of_the_description() -> Result<()> {
    let setup = Setup::new()?;
    let (_vmm, mut api) = setup.configured()?;
    for started in [false, true] {
        if started {
            start(&mut api)?;
        }
        for (operation, _) in setup.operations(&[Phase::Always]) {
            let (Some(schema), "GET") = (&operation.answer, operation.method.as_str()) else { continue };
            let answer = send(&mut api, operation, None)?.ok()?.json()?;
            if schema == "object" {
                ensure!(answer.is_object(), "{operation:?}: {answer}");
                continue;
            }
            let faults = setup.api.faults_of_answer(schema, &answer);
            ensure!(faults.is_empty(), "{operation:?}: {faults:?}");
        }
        let config = api.get("/vm/config")?.json()?;
        for section in setup.api.schemas["FullVmConfiguration"].fields.keys() {
            ensure!(config.get(section).is_some(), "GET /vm/config has no {section}: {config}");
        }
    }
    Ok(())
}

#[test]
fn a_body_that_breaks_a_rule_is_refused_by_field() -> Result<()> {
    let setup = Setup::new()?;
    let (_vmm, mut api) = setup.configured()?;
    break_each_rule(&setup, &mut api, Phase::BeforeStart)?;
    start(&mut api)?;
    break_each_rule(&setup, &mut api, Phase::AfterStart)
}

/// Sends every bad body of the operations of a phase. Each is refused and changes nothing.
fn break_each_rule(setup: &Setup, api: &mut ApiClient, phase: Phase) -> Result<()> {
    let before = api.get("/vm/config")?.json()?;
    let mut faults = Vec::new();
    for (operation, body) in setup.operations(&[phase]) {
        let (Some(schema), Some(body)) = (&operation.body, body) else { continue };
        for bad in setup.api.bad_bodies(schema, body) {
            // For PATCH all fields but the id may be absent.
            let optional = operation.method == "PATCH" && bad.rule == "missing" && !bad.name.ends_with("id");
            if OTHER_RULES.contains(&(bad.field.as_str(), bad.rule)) || optional {
                continue;
            }
            faults.extend(refusal_fault(api, operation, &bad)?);
        }
    }
    ensure!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert_eq!(api.get("/vm/config")?.json()?, before);
    Ok(())
}

/// What is wrong with the answer to a bad body.
fn refusal_fault(api: &mut ApiClient, operation: &Operation, bad: &BadBody) -> Result<Option<String>> {
    let response = api.request(&operation.method, &path(operation), Some(&bad.body))?;
    let what = format!("{} {}: {} {}", operation.method, operation.path, bad.field, bad.rule);
    Ok(match (response.status, response.fault()) {
        (400, fault) if fault.contains(&bad.name) => None,
        (400, fault) => Some(format!("{what}: not named: {fault}")),
        (status, _) => Some(format!("{what}: status {status} for {}", bad.body)),
    })
}
