//! The requests of Firecracker's clients, and the responses that they read.

use std::time::Duration;

use serde_json::json;
use vesta_tests::cpu::is_intel;
use vesta_tests::elf;
use vesta_tests::guest::{Guest, start, vmm_path};
use vesta_tests::vmm::VmmBuilder;

const TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn the_name_firecracker_selects_firecrackers_identity() {
    let mut vmm =
        VmmBuilder::new(&vmm_path()).unwrap().with_name("firecracker").arg("--version").spawn().unwrap();
    let (code, output) = vmm.finish(TIMEOUT).unwrap();
    assert_eq!(code, 0);
    assert!(output.starts_with("Firecracker v1.17.0\n"), "{output}");

    let vmm = VmmBuilder::new(&vmm_path()).unwrap().with_name("firecracker").with_api().spawn().unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let info = api.get("/").unwrap().json().unwrap();
    assert_eq!((&info["app_name"], &info["vmm_version"]), (&json!("Firecracker"), &json!("1.17.0")));
    vmm.wait_for_output("Running Firecracker v1.17", TIMEOUT).unwrap();
}

#[test]
fn the_go_sdks_order_of_calls_works() {
    let vmm = VmmBuilder::new(&vmm_path())
        .unwrap()
        .with_api()
        .arg("--id")
        .arg("vm-7")
        .arg("--no-seccomp")
        .spawn()
        .unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let log = vmm.dir().join("log.fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &log, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let reader = std::fs::OpenOptions::new().read(true).write(true).open(&log).unwrap();
    let logger = json!({"log_path": log, "level": "Error", "show_level": true, "show_log_origin": false});
    api.put("/logger", &logger).unwrap().ok().unwrap();
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, elf::null_guest().bytes()).unwrap();
    // firecracker-containerd sends T2 on Intel only.
    let template = if is_intel() { "T2" } else { "T2A" };
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "cpu_template": template});
    let response = api.put("/machine-config", &machine).unwrap();
    assert_eq!((response.status, response.header("deprecation")), (204, Some("true")));
    assert_eq!(api.get("/machine-config").unwrap().json().unwrap()["cpu_template"], template);
    api.put("/boot-source", &Guest::bare(&kernel).boot_source()).unwrap().ok().unwrap();
    start(&mut api).unwrap();
    assert_eq!(api.get("/").unwrap().json().unwrap()["state"], "Running");
    assert_eq!(api.get("/").unwrap().json().unwrap()["id"], "vm-7");
    let mut first = [0; 200];
    let len = rustix::io::read(&reader, &mut first).unwrap();
    let line = String::from_utf8_lossy(&first[..len]).into_owned();
    assert!(line.contains("[vm-7:main:INFO] Running vesta-vmm v"), "{line}");
}

#[test]
fn the_whole_configuration_can_be_read_back() {
    let vmm = VmmBuilder::new(&vmm_path()).unwrap().with_api().spawn().unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, elf::null_guest().bytes()).unwrap();
    let guest = Guest::bare(&kernel).vcpus(2).mem_mib(64).boot_args("quiet");
    guest.put(&mut api).unwrap();
    for _ in 0..2 {
        let config = api.get("/vm/config").unwrap().json().unwrap();
        assert_eq!(config["boot-source"], guest.boot_source());
        assert_eq!(
            (&config["machine-config"]["vcpu_count"], &config["machine-config"]["mem_size_mib"]),
            (&json!(2), &json!(64))
        );
        if config["boot-source"].is_object()
            && api.get("/").unwrap().json().unwrap()["state"] == "Not started"
        {
            start(&mut api).unwrap();
        }
    }
    assert_eq!(api.get("/version").unwrap().json().unwrap(), json!({"firecracker_version": "1.17.0"}));
    api.put("/actions", &json!({"action_type": "FlushMetrics"})).unwrap().ok().unwrap();
}

#[test]
fn a_stalled_client_delays_no_other_client() {
    use std::io::Write;
    let vmm = VmmBuilder::new(&vmm_path()).unwrap().with_api().spawn().unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let mut stalled = api.connect().unwrap();
    stalled.write_all(b"PUT /boot-source HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap();
    for _ in 0..10 {
        api.get("/").unwrap().ok().unwrap();
    }
}
