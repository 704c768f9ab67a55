//! What each endpoint takes, when, and what it then shows: as Firecracker's clients expect it.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::elf::null_guest;
use vesta_tests::guest::{Guest, Transport, start, vmm_with_api};
use vesta_tests::snapshots::{Files, pause, restore};
use vesta_tests::vmm::Vmm;

/// A monitor with a drive `d` that has a limit of operations, ready to start.
fn configured() -> Result<(Vmm, ApiClient)> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let (kernel, disk) = (vmm.dir().join("kernel"), vmm.dir().join("disk"));
    std::fs::write(&kernel, null_guest().bytes())?;
    std::fs::write(&disk, [0; 8192])?;
    let drive = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": disk,
        "rate_limiter": {"ops": {"size": 5, "refill_time": 100}},
    });
    api.put("/drives/d", &drive)?.ok()?;
    Guest::bare(&kernel).put(&mut api)?;
    Ok((vmm, api))
}

/// Sends each request. All are refused, with this text.
fn all_refused(api: &mut ApiClient, requests: &[(&str, &str, Value)], text: &str) -> Result<()> {
    for (method, path, body) in requests {
        let response = api.request(method, path, Some(&body.to_string()))?;
        assert_eq!(response.status, 400, "{method} {path}: {}", response.body);
        ensure!(response.fault().contains(text), "{method} {path}: {}", response.body);
    }
    Ok(())
}

#[test]
fn wrong_phase_has_the_text_that_clients_match() -> Result<()> {
    let (vmm, mut api) = configured()?;
    let disk = vmm.dir().join("disk");
    let files = Files::new(vmm.dir(), "a");
    let after = [
        ("PUT", "/actions", json!({"action_type": "FlushMetrics"})),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"})),
        ("PATCH", "/vm", json!({"state": "Paused"})),
        ("PATCH", "/drives/d", json!({"drive_id": "d"})),
        ("PATCH", "/network-interfaces/e", json!({"iface_id": "e"})),
        ("PUT", "/snapshot/create", files.create("Full")),
    ];
    all_refused(&mut api, &after, "operation is not supported before starting the microVM")?;
    start(&mut api)?;
    let before = [
        ("PUT", "/actions", json!({"action_type": "InstanceStart"})),
        ("PUT", "/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 64})),
        // The phase comes before the bounds.
        ("PUT", "/machine-config", json!({"vcpu_count": 0, "mem_size_mib": 64})),
        ("PATCH", "/machine-config", json!({"smt": false})),
        ("PUT", "/boot-source", json!({"kernel_image_path": "/nowhere"})),
        ("PUT", "/logger", json!({})),
        ("PUT", "/serial", json!({})),
        ("PUT", "/drives/d", json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk})),
        ("PUT", "/network-interfaces/e", json!({"iface_id": "e", "host_dev_name": "tap0"})),
        ("PUT", "/vsock", json!({"guest_cid": 3, "uds_path": "v"})),
        ("PUT", "/entropy", json!({})),
        ("PUT", "/mmds/config", json!({"network_interfaces": ["e"]})),
        ("PUT", "/snapshot/load", files.load()),
    ];
    all_refused(&mut api, &before, "operation is not supported after starting the microVM")?;
    all_refused(&mut api, &before[7..9], "does not support hot-plug")?;
    let deleted = api.delete("/drives/d")?;
    ensure!(deleted.status == 400 && deleted.fault().contains("hot-unplug"), "{}", deleted.body);
    Ok(())
}

#[test]
fn refused_request_with_a_deprecated_field_says_so() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    for (path, body, deprecated) in [
        ("/mmds/config", json!({"network_interfaces": []}), true),
        ("/mmds/config", json!({"network_interfaces": [], "version": "V2"}), false),
        ("/machine-config", json!({"vcpu_count": 0, "mem_size_mib": 1, "cpu_template": "T2"}), true),
        ("/vsock", json!({"guest_cid": 3, "uds_path": "", "vsock_id": "v"}), true),
    ] {
        let response = api.put(path, &body)?;
        assert_eq!(response.status, 400, "{path} {body}");
        assert_eq!(response.header("deprecation").is_some(), deprecated, "{path} {body}");
    }
    Ok(())
}

#[test]
fn values_out_of_bounds_are_refused_with_the_bound() -> Result<()> {
    let (_vmm, mut api) = configured()?;
    let before = api.get("/vm/config")?.json()?;
    let bucket = json!({"size": 1, "refill_time": u64::MAX});
    for (path, body, bound) in [
        ("/machine-config", json!({"vcpu_count": 129, "mem_size_mib": 128}), "between 1 and 128"),
        ("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 1_048_577}), "between 1 and 1048576"),
        ("/boot-source", json!({"kernel_image_path": "k", "boot_args": "x".repeat(2048)}), "2048"),
        ("/serial", json!({"rate_limiter": bucket}), "refill_time"),
        ("/entropy", json!({"rate_limiter": {"ops": bucket}}), "refill_time"),
        ("/vsock", json!({"guest_cid": 3, "uds_path": "x".repeat(108)}), "1 to 107"),
        ("/network-interfaces/e", json!({"iface_id": "e", "host_dev_name": "t", "mtu": 67}), "between 68"),
        (
            "/mmds/config",
            json!({"network_interfaces": ["e"], "ipv4_address": "10.0.0.1"}),
            "between 169.254.1.0 and 169.254.254.255",
        ),
    ] {
        all_refused(&mut api, &[("PUT", path, body)], bound)?;
    }
    assert_eq!(api.get("/vm/config")?.json()?, before);
    Ok(())
}

#[test]
fn path_of_a_missing_drive_file_comes_last() -> Result<()> {
    let (vmm, mut api) = configured()?;
    let missing = vmm.dir().join("no-such-disk");
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": missing});
    let put = api.put("/drives/d", &drive)?.fault();
    start(&mut api)?;
    let patched = api.patch("/drives/d", &json!({"drive_id": "d", "path_on_host": missing}))?.fault();
    for fault in [put, patched] {
        ensure!(fault.ends_with(&format!("(os error 2) {}", missing.display())), "{fault}");
    }
    Ok(())
}

#[test]
fn patch_replaces_keeps_and_removes_each_bucket() -> Result<()> {
    let (_vmm, mut api) = configured()?;
    start(&mut api)?;
    let ops = json!({"size": 5, "refill_time": 100});
    let bandwidth = json!({"size": 7, "refill_time": 10});
    for (limiter, shown) in [
        (json!({}), json!({"ops": ops})),
        (json!({"bandwidth": bandwidth}), json!({"bandwidth": bandwidth, "ops": ops})),
        (json!({"bandwidth": null}), json!({"bandwidth": bandwidth, "ops": ops})),
        (json!({"ops": {"size": 0, "refill_time": 1}}), json!({"bandwidth": bandwidth})),
        (json!({"bandwidth": {"size": 1, "refill_time": 0}}), json!(null)),
    ] {
        api.patch("/drives/d", &json!({"drive_id": "d", "rate_limiter": limiter}))?.ok()?;
        assert_eq!(api.get("/vm/config")?.json()?["drives"][0]["rate_limiter"], shown, "{limiter}");
    }
    let unknown = api.patch("/drives/e", &json!({"drive_id": "e", "rate_limiter": {}}))?;
    ensure!(unknown.fault().contains("drive e"), "{}", unknown.body);
    let empty = api.patch("/drives/d", &json!({"drive_id": "d", "rate_limiter": null}))?;
    ensure!(empty.status == 400 && empty.fault().contains("no field to change"), "{}", empty.body);
    Ok(())
}

#[test]
fn second_put_replaces_the_first() -> Result<()> {
    let (vmm, mut api) = configured()?;
    let other = vmm.dir().join("other");
    std::fs::write(&other, [0; 4096])?;
    let drive = json!({"drive_id": "d", "is_root_device": true, "path_on_host": other, "is_read_only": true});
    api.put("/drives/d", &drive)?.ok()?;
    let bucket = json!({"bandwidth": {"size": 9, "refill_time": 9}});
    for limiter in [&bucket, &json!(null)] {
        api.put("/entropy", &json!({"rate_limiter": limiter}))?.ok()?;
        let socket = vmm.dir().join(if limiter.is_null() { "v2" } else { "v1" });
        api.put("/vsock", &json!({"guest_cid": 3, "uds_path": socket}))?.ok()?;
        let shown = api.get("/vm/config")?.json()?;
        assert_eq!(
            (&shown["entropy"]["rate_limiter"], &shown["vsock"]["uds_path"]),
            (limiter, &json!(socket))
        );
        assert_eq!(shown["drives"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            (&shown["drives"][0]["path_on_host"], &shown["drives"][0]["rate_limiter"]),
            (&json!(other), &json!(null))
        );
    }
    ensure!(!vmm.dir().join("v1").exists() && vmm.dir().join("v2").exists());
    Ok(())
}

#[test]
fn every_key_of_the_configuration_is_shown() -> Result<()> {
    let (_vmm, mut api) = configured()?;
    for _ in 0..2 {
        let body = api.get("/vm/config")?.body;
        let keys = [
            "balloon",
            "boot-source",
            "cpu-config",
            "drives",
            "entropy",
            "logger",
            "machine-config",
            "memory-hotplug",
            "metrics",
            "mmds-config",
            "network-interfaces",
            "pmem",
            "vsock",
        ];
        let at: Vec<_> = keys.iter().map(|key| body.find(&format!("\"{key}\":"))).collect();
        ensure!(at.iter().all(Option::is_some) && at.is_sorted(), "{at:?}: {body}");
        if api.get("/")?.json()?["state"] == "Not started" {
            start(&mut api)?;
        }
    }
    Ok(())
}

#[test]
fn shown_configuration_survives_save_and_load() -> Result<()> {
    let (vmm, mut api) = configured()?;
    let machine = json!({"vcpu_count": 2, "mem_size_mib": 32, "smt": true, "track_dirty_pages": true});
    api.put("/machine-config", &machine)?.ok()?;
    api.put(
        "/entropy",
        &json!({"rate_limiter": {"bandwidth": {"size": 9, "one_time_burst": 3, "refill_time": 9}}}),
    )?
    .ok()?;
    let vsock = json!({"guest_cid": 7, "uds_path": vmm.dir().join("v"), "vsock_id": "root"});
    api.put("/vsock", &vsock)?.ok()?;
    start(&mut api)?;
    pause(&mut api)?;
    let shown = api.get("/vm/config")?.json()?;
    let files = Files::new(vmm.dir(), "saved");
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    let mut load = files.load();
    let socket = vmm.dir().join("v2");
    load["vsock_override"] = json!({"uds_path": socket});
    load["track_dirty_pages"] = json!(true);
    let disk = vmm.dir().join("copy");
    std::fs::copy(vmm.dir().join("disk"), &disk)?;
    load["drives"] = json!([{"drive_id": "d", "path_on_host": disk}]);
    let (_restored, mut api) = restore(Transport::Mmio, &load)?;
    let mut expected = shown;
    expected["vsock"]["uds_path"] = json!(socket);
    expected["drives"][0]["path_on_host"] = json!(disk);
    assert_eq!(api.get("/vm/config")?.json()?, expected);
    Ok(())
}
