//! What clients may send to the API: bytes that are no HTTP, bodies that are no JSON, and requests
//! as old clients write them. Nothing of it changes the microVM, takes memory or delays others.

use std::io::{Read, Write};
use std::net::Shutdown;

use anyhow::{Context, Result, ensure};
use vesta_tests::api::{ApiClient, read_response};
use vesta_tests::elf::null_guest;
use vesta_tests::guest::{Guest, start, vmm_with_api};
use vesta_tests::vmm::Vmm;

/// A request with this body.
fn message(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// Requests that are refused in every phase.
fn hostile_requests() -> Vec<Vec<u8>> {
    let deep = |open: &str| open.repeat(20_000).into_bytes();
    let long_id = "x".repeat(65);
    let drive = |id: &str, rest: &str| {
        let body = format!(r#"{{"drive_id":"{id}","is_root_device":false,{rest}}}"#);
        message("PUT", &format!("/drives/{id}"), body.as_bytes())
    };
    let limiter =
        |bucket: &str| drive("d", &format!(r#""path_on_host":"x","rate_limiter":{{"ops":{bucket}}}"#));
    vec![
        message("PUT", "/mmds", &deep("[")),
        message("PUT", "/mmds", &deep(r#"{"a":"#)),
        message("PATCH", "/mmds", &deep(r#"{"a":"#)),
        message("PUT", "/machine-config", &deep("[")),
        message("PUT", "/mmds", b"{\"a\":\"\xff\xfe\"}"),
        message("PUT", "/mmds", br#"{"a":1e400}"#),
        message("PUT", "/mmds", br#"{"a":1"#),
        message("PUT", "/machine-config", br#"{"vcpu_count":1,"mem_size_mib":1e400}"#),
        message("PUT", "/machine-config", br#"{"vcpu_count":1,"mem_size_mib":18446744073709551616}"#),
        message("PUT", "/machine-config", br#"{"vcpu_count":-1,"mem_size_mib":128}"#),
        message("PUT", "/machine-config", br#"{"vcpu_count":1,"vcpu_count":2,"mem_size_mib":128}"#),
        message("PUT", "/machine-config", br#"{"vcpu_count":"1","mem_size_mib":128}"#),
        message("PUT", "/machine-config", br#"{"vcpu_count":1,"mem_size_mib":128,"colour":1}"#),
        message("PATCH", "/machine-config", b"{}"),
        message("PUT", "/boot-source", br#"{"kernel_image_path":"a\u0000b"}"#),
        message("PUT", "/boot-source", br#"{"kernel_image_path":["a"]}"#),
        message("PUT", "/logger", br#"{"log_path":"a\u0000b"}"#),
        message("PUT", "/serial", br#"{"serial_out_path":"a\u0000b"}"#),
        message("PUT", "/vsock", br#"{"guest_cid":3,"uds_path":"a\u0000b"}"#),
        message("PUT", "/vsock", br#"{"guest_cid":4294967296,"uds_path":"v"}"#),
        message("PUT", "/snapshot/load", br#"{"snapshot_path":"a\u0000b","mem_file_path":"c"}"#),
        drive("d", r#""path_on_host":"a\u0000b""#),
        drive(&long_id, r#""path_on_host":"/dev/null""#),
        drive("a-b", r#""path_on_host":"/dev/null""#),
        drive("d", r#""socket":"/s""#),
        limiter(r#"{"size":-1,"refill_time":1}"#),
        limiter(r#"{"size":1,"refill_time":18446744073709551615}"#),
        limiter(r#"{"size":1.5,"refill_time":1}"#),
        message("PUT", "/network-interfaces/e", br#"{"iface_id":"e","host_dev_name":"a\u0000b"}"#),
        message("PUT", "/actions", br#"{"action_type":"InstanceStart"} x"#),
        message("PATCH", "/vm", br#"{"state":"paused"}"#),
        message("GET", "/", b"{}"),
        message("POST", "/actions", br#"{"action_type":"InstanceStart"}"#),
        message("PUT", "/logger", &vec![b'x'; 60_000]),
        b"hello\r\n\r\n".to_vec(),
        b"GET / HTTP/3.0\r\n\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n".to_vec(),
        format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(9000)).into_bytes(),
    ]
}

/// Resident memory of the monitor, in KiB.
fn resident_kib(vmm: &Vmm) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Sends all [`hostile_requests`] on one connection.
fn send_hostile(api: &mut ApiClient) -> Result<()> {
    for request in hostile_requests() {
        let shown = String::from_utf8_lossy(&request[..request.len().min(120)]).into_owned();
        let response = api.send_raw(&request).with_context(|| shown.clone())?;
        assert_eq!(response.status, 400, "{shown}: {}", response.body);
        ensure!(response.body.contains("fault_message") || response.body.contains("error"), "{shown}");
        ensure!(response.header("connection") == Some("keep-alive"), "{shown}");
    }
    Ok(())
}

#[test]
fn hostile_requests_change_nothing_and_take_no_memory() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    Guest::bare(&kernel).put(&mut api)?;
    for phase in ["Not started", "Running"] {
        if phase == "Running" {
            start(&mut api)?;
        }
        let before = (api.get("/")?.json()?, api.get("/vm/config")?.json()?);
        send_hostile(&mut api)?;
        let resident = resident_kib(&vmm)?;
        for _ in 0..30 {
            send_hostile(&mut api)?;
        }
        let growth = resident_kib(&vmm)?.saturating_sub(resident);
        ensure!(growth < 256, "{growth} KiB more after 30 times the same requests");
        assert_eq!((api.get("/")?.json()?, api.get("/vm/config")?.json()?), before);
        assert_eq!(before.0["state"], phase);
    }
    Ok(())
}

#[test]
fn requests_that_stop_halfway_change_nothing() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let before = api.get("/vm/config")?.json()?;
    let whole = message("PUT", "/machine-config", br#"{"vcpu_count":2,"mem_size_mib":64}"#);
    for end in 0..whole.len() {
        let mut client = api.connect()?;
        client.write_all(&whole[..end])?;
        client.shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        client.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "{end}: {}", String::from_utf8_lossy(&rest));
    }
    assert_eq!(vmm.client().get("/vm/config")?.json()?, before);
    Ok(())
}

#[test]
fn silent_and_half_dead_clients_cost_nobody_anything() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    let beginnings = ["", "G", "GET / HTTP/1.1\r\n", "PUT /logger HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"];
    let mut held = Vec::new();
    for beginning in beginnings.iter().cycle().take(9) {
        let mut client = api.connect()?;
        client.write_all(beginning.as_bytes())?;
        held.push(client);
    }
    for _ in 0..100 {
        api.get("/")?.ok()?;
    }
    // The eleventh is refused until one of the ten is gone, and then at once.
    assert_eq!(read_response(&mut api.connect()?)?.status, 503);
    for _ in 0..50 {
        held.pop();
        let mut next = api.connect()?;
        next.write_all(b"GET /version HTTP/1.1\r\n\r\n")?;
        assert_eq!(read_response(&mut next)?.status, 200);
        held.push(next);
    }
    Ok(())
}

#[test]
fn old_clients_send_several_requests_on_one_connection() -> Result<()> {
    let (_vmm, api) = vmm_with_api(&[])?;
    let mut client = api.connect()?;
    for head in [
        "GET /version HTTP/1.0",
        "GET /version HTTP/1.0",
        "GET /version HTTP/1.1\r\nConnection: close",
        "GET /version HTTP/1.1",
    ] {
        client.write_all(format!("{head}\r\n\r\n").as_bytes())?;
        let response = read_response(&mut client)?;
        assert_eq!((response.status, response.header("connection")), (200, Some("keep-alive")), "{head}");
    }
    client.write_all(&message("POST", "/vm", &vec![b'x'; 1 << 20]))?;
    assert_eq!(read_response(&mut client)?.status, 400);
    client.write_all(b"PUT /logger HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")?;
    let mut bytes =
        vec![0; "HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n".len()];
    client.read_exact(&mut bytes)?;
    ensure!(bytes.starts_with(b"HTTP/1.1 100 \r\n"), "{}", String::from_utf8_lossy(&bytes));
    assert_eq!(read_response(&mut client)?.status, 204);
    Ok(())
}
