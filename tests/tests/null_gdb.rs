//! Debugging guests of a few instructions, by gdb and by packets of its protocol.
//!
//! A software KVM (PVM) has breakpoints and single steps, but no watch points.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::elf::{CHECK, COUNT, END, LOAD_ADDRESS, LOOP, STORE, counting_guest};
use vesta_tests::gdb::{Gdb, RemoteClient};
use vesta_tests::guest::{Guest, TIMEOUT, start, vmm_with_api};
use vesta_tests::vmm::Vmm;

/// A counting guest that is configured, with a debugger's socket.
fn configured(vcpus: u32) -> Result<(Vmm, ApiClient, PathBuf)> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, counting_guest().bytes())?;
    Guest::bare(&kernel).vcpus(vcpus).mem_mib(16).put(&mut api)?;
    let socket = vmm.dir().join("gdb.sock");
    api.patch("/machine-config", &json!({"gdb_socket_path": socket}))?.ok()?;
    Ok((vmm, api, socket))
}

/// The same, started: it waits at its entry.
fn waiting(vcpus: u32) -> Result<(Vmm, ApiClient, PathBuf)> {
    let (vmm, mut api, socket) = configured(vcpus)?;
    start(&mut api)?;
    Ok((vmm, api, socket))
}

fn connect(socket: &std::path::Path) -> Result<RemoteClient> {
    RemoteClient::connect(socket, TIMEOUT)
}

/// The count, as a debugger reads it.
fn count(client: &mut RemoteClient) -> Result<u32> {
    let bytes = client.ask(&format!("m{COUNT:x},4"))?;
    Ok(u32::from_str_radix(&bytes, 16)?.swap_bytes())
}

/// Lets the guest of a client end.
fn end_guest(client: &mut RemoteClient) -> Result<()> {
    assert_eq!(client.ask(&format!("M{END:x},4:01000000"))?, "OK");
    Ok(())
}

#[test]
fn gdb_breaks_steps_interrupts_and_detaches() -> Result<()> {
    let (mut vmm, mut api, socket) = waiting(2)?;
    assert_eq!(api.get("/")?.json()?["state"], "Running");
    assert_eq!(api.get("/machine-config")?.json()?["gdb_socket_path"], json!(socket));
    let mut gdb = Gdb::start(None, TIMEOUT)?;
    let attach = format!("target remote {}", socket.display());
    let attached = gdb.run(&attach)?;
    ensure!(attached.contains(&format!("{LOAD_ADDRESS:#018x}")), "{attached}");
    let threads = gdb.run("info threads")?;
    ensure!(threads.contains("(vCPU 0)") && threads.contains("(vCPU 1)"), "{threads}");

    let broke = gdb.run(&format!("break *{CHECK:#x}"))?;
    ensure!(broke.contains("Breakpoint 1"), "{broke}");
    for number in 1..3 {
        let hit = gdb.run("continue")?;
        ensure!(hit.contains("hit Breakpoint 1"), "{hit}");
        assert_eq!(gdb.run("print $eax")?.trim(), format!("${number} = {number}"));
        let memory = gdb.run(&format!("x/dw {COUNT:#x}"))?;
        ensure!(memory.trim().ends_with(&format!(":\t{number}")), "{memory}");
    }
    // The breakpoint is not in what gdb reads.
    let code = gdb.run(&format!("x/2xb {CHECK:#x}"))?;
    ensure!(code.contains("0x83\t0x3c"), "{code}");
    gdb.run("stepi")?;
    let stepped = gdb.run("stepi")?;
    ensure!(stepped.contains(&format!("{LOOP:#018x}")), "{stepped}");
    gdb.run("delete")?;

    let hardware = gdb.run(&format!("hbreak *{STORE:#x}"))?;
    ensure!(hardware.contains("Hardware assisted breakpoint 2"), "{hardware}");
    let hit = gdb.run("continue")?;
    ensure!(hit.contains("hit Breakpoint 2") && hit.contains(&format!("{STORE:#018x}")), "{hit}");
    gdb.run("set var $eax = 1000")?;
    gdb.run("set var $xmm1.v4_int32[2] = 7")?;
    let vector = gdb.run("print $xmm1.v4_int32")?;
    ensure!(vector.contains("{0, 0, 7, 0}"), "{vector}");
    gdb.run("stepi")?;
    let memory = gdb.run(&format!("x/dw {COUNT:#x}"))?;
    ensure!(memory.trim().ends_with(":\t1000"), "{memory}");
    gdb.run("delete")?;

    // By single steps, because a software KVM has no watch points.
    gdb.run("set can-use-hw-watchpoints 0")?;
    gdb.run(&format!("watch *(int *){COUNT:#x}"))?;
    let changed = gdb.run("continue")?;
    ensure!(changed.contains("Old value = 1000") && changed.contains("New value = 1001"), "{changed}");
    gdb.run("delete")?;

    gdb.begin("continue")?;
    let interrupted = gdb.interrupt()?;
    ensure!(interrupted.contains("SIGINT"), "{interrupted}");
    let detached = gdb.run("detach")?;
    ensure!(detached.contains("detached"), "{detached}");

    let again = gdb.run(&attach)?;
    ensure!(again.contains("0x00000000001000"), "{again}");
    gdb.run(&format!("set *(int*){END:#x} = 1"))?;
    let ended = gdb.run("continue")?;
    ensure!(ended.contains("exited normally"), "{ended}");
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    ensure!(!socket.exists(), "the socket is still there");
    Ok(())
}

#[test]
fn killing_the_guest_ends_the_monitor() -> Result<()> {
    let (mut vmm, _api, socket) = waiting(1)?;
    let mut client = connect(&socket)?;
    assert_eq!(client.ask("vKill;1")?, "OK");
    client.wait_closed()?;
    let (code, printed) = vmm.finish(TIMEOUT)?;
    assert_eq!(code, 0);
    ensure!(printed.contains("a debugger killed the guest"), "{printed}");
    ensure!(!socket.exists(), "the socket is still there");
    Ok(())
}

#[test]
fn signal_that_ends_the_monitor_is_reported() -> Result<()> {
    let (vmm, _api, socket) = waiting(1)?;
    let mut client = connect(&socket)?;
    ensure!(client.ask("?")?.starts_with('T'), "it is stopped");
    client.send("vCont;c")?;
    vmm.signal(Signal::TERM)?;
    assert_eq!(client.receive()?, "X0f");
    client.wait_closed()
}

#[test]
fn snapshots_and_forks_wait_for_the_debugger_to_detach() -> Result<()> {
    let (vmm, mut api, socket) = waiting(1)?;
    let mut client = connect(&socket)?;
    assert_eq!(client.ask(&format!("Z0,{CHECK:x},1"))?, "OK");
    let path = |name: &str| vmm.dir().join(name);
    let snapshot = json!({"snapshot_path": path("state"), "mem_file_path": path("memory")});
    let mut live = snapshot.clone();
    live["live"] = json!(true);
    let fork = json!({"children": [{"id": "child", "api_socket": path("child.sock")}]});
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    for (request, body) in [("/snapshot/create", &snapshot), ("/snapshot/create", &live), ("/fork", &fork)] {
        let refused = api.put(request, body)?;
        assert_eq!(refused.status, 400);
        let fault = refused.fault();
        ensure!(fault.contains("a debugger is attached") && fault.contains("gdb.sock"), "{fault}");
    }
    ensure!(!path("state").exists() && !path("memory").exists(), "a refused snapshot left files");

    assert_eq!(client.ask("D")?, "OK");
    // Then the breakpoints are gone.
    client.wait_closed()?;
    api.put("/snapshot/create", &snapshot)?.ok()?;
    let memory = std::fs::read(path("memory"))?;
    assert_eq!(memory[CHECK as usize..][..2], [0x83, 0x3c], "the breakpoint is in the snapshot");
    // The restored microVM has no debugger, and runs.
    let (_restored, mut api) = vmm_with_api(&[])?;
    let load = json!({"snapshot_path": path("state"), "mem_backend":
        {"backend_type": "File", "backend_path": path("memory")}, "resume_vm": true});
    api.put("/snapshot/load", &load)?.ok()?;
    let config = api.get("/machine-config")?.json()?;
    assert_eq!(config.get("gdb_socket_path"), None);
    Ok(())
}

#[test]
fn pause_by_the_api_and_hold_by_the_debugger_are_independent() -> Result<()> {
    let (mut vmm, mut api, socket) = waiting(2)?;
    let mut client = connect(&socket)?;
    assert_eq!(client.ask(&format!("Z0,{CHECK:x},1"))?, "OK");
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    // It runs only once both let it.
    client.send("vCont;c")?;
    client.send_raw(b"\x03")?;
    ensure!(client.receive()?.starts_with("T02"), "it was interrupted");
    assert_eq!(count(&mut client)?, 0);
    client.send("vCont;c")?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    let hit = client.receive()?;
    ensure!(hit.starts_with("T05") && hit.contains("swbreak"), "{hit}");
    assert_eq!(count(&mut client)?, 1);
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    assert_eq!(count(&mut client)?, 1);
    assert_eq!(client.ask(&format!("z0,{CHECK:x},1"))?, "OK");
    end_guest(&mut client)?;
    assert_eq!(client.ask("vCont;c")?, "W00");
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    Ok(())
}

#[test]
fn breakpoint_of_a_debugger_that_died_is_gone() -> Result<()> {
    let (vmm, _api, socket) = waiting(1)?;
    let mut first = connect(&socket)?;
    assert_eq!(first.ask(&format!("Z0,{CHECK:x},1"))?, "OK");
    first.send("vCont;c")?;
    ensure!(first.receive()?.contains("swbreak"), "it is hit");
    drop(first);
    vmm.wait_for_output("the debugger is gone", TIMEOUT)?;
    let mut second = connect(&socket)?;
    assert_eq!(second.ask(&format!("m{CHECK:x},2"))?, "833c");
    let before = count(&mut second)?;
    second.send("vCont;c")?;
    second.send_raw(b"\x03")?;
    ensure!(second.receive()?.starts_with("T02"), "it runs until it is interrupted");
    ensure!(count(&mut second)? >= before, "it counts on");
    Ok(())
}

#[test]
fn int3_of_the_guest_is_no_breakpoint() -> Result<()> {
    let (vmm, _api, socket) = waiting(1)?;
    let mut client = connect(&socket)?;
    // The guest's own instruction, at another address than the breakpoint.
    assert_eq!(client.ask(&format!("M{LOAD_ADDRESS:x},1:cc"))?, "OK");
    assert_eq!(client.ask(&format!("Z0,{CHECK:x},1"))?, "OK");
    // Without a table of interrupts, the exception that it raises is a triple fault.
    assert_eq!(client.ask("vCont;c")?, "W00");
    vmm.wait_for_output("triple fault", TIMEOUT)?;
    Ok(())
}

/// The second GiB of a guest that is entered in 64-bit mode, once it leads to the first.
const ALIAS: u64 = 1 << 30;

#[test]
fn address_that_is_not_mapped_and_alias_of_a_patched_byte() -> Result<()> {
    let (mut vmm, mut api, socket) = configured(1)?;
    let mut kernel = counting_guest();
    kernel.pvh_entry = None;
    std::fs::write(vmm.dir().join("kernel"), kernel.bytes())?;
    start(&mut api)?;
    let mut client = connect(&socket)?;
    let alias = |address: u32| ALIAS + u64::from(address);
    ensure!(client.ask(&format!("m{:x},1", alias(CHECK)))?.starts_with('E'), "it is mapped");
    // Before the address is mapped, the breakpoint has a debug register.
    assert_eq!(client.ask(&format!("Z0,{:x},1", alias(CHECK)))?, "OK");
    let table = client.ask("ma000,8")?;
    assert_eq!(client.ask(&format!("Ma008,8:{table}"))?, "OK");
    assert_eq!(client.ask(&format!("m{:x},2", alias(CHECK)))?, "833c");
    client.set_pc(alias(LOAD_ADDRESS))?;
    let hit = client.ask("vCont;c")?;
    ensure!(hit.starts_with("T05") && hit.contains("hwbreak"), "{hit}");
    assert_eq!(count(&mut client)?, 1);
    assert_eq!(client.ask(&format!("z0,{:x},1", alias(CHECK)))?, "OK");

    // The byte is patched for its other address. The guest runs over it, here and in the loop.
    assert_eq!(client.ask(&format!("Z0,{CHECK:x},1"))?, "OK");
    client.send("vCont;c")?;
    client.send_raw(b"\x03")?;
    ensure!(client.receive()?.starts_with("T02"), "it runs until it is interrupted");
    assert_eq!(client.ask(&format!("m{CHECK:x},2"))?, "833c");
    end_guest(&mut client)?;
    assert_eq!(client.ask("vCont;c")?, "W00");
    vmm.wait_for_output("the guest reset itself", TIMEOUT)?;
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    Ok(())
}

#[test]
fn one_debugger_is_served_and_others_are_turned_away() -> Result<()> {
    let (_vmm, _api, socket) = waiting(1)?;
    // Connections that send nothing are none.
    let silent = connect(&socket)?;
    drop(connect(&socket)?);
    let mut client = connect(&socket)?;
    ensure!(client.ask("?")?.starts_with("T05"), "it is stopped");
    connect(&socket)?.wait_closed()?;
    drop(silent);
    assert_eq!(count(&mut client)?, 0);
    Ok(())
}

#[test]
fn malformed_packets_end_a_session_and_not_the_guest() -> Result<()> {
    let (mut vmm, mut api, socket) = waiting(1)?;
    for bytes in [&b"\x80\xff\0garbage$#00"[..], b"$m0,4#00", &vec![b'$'; 1 << 16]] {
        let mut client = connect(&socket)?;
        // The monitor may close the connection before it has all.
        let _ = client.send_raw(bytes);
        client.close()?;
    }
    for packet in [
        "Z0,zz,1",
        "Z9,0,1",
        "Z2,ffffffffffffffff,ffffffffffffffff",
        "vCont;s:p1.ffffffffffffffff;c",
        "vCont;t",
        "m0,ffffffffffffffff",
        "m100000,100000",
        "Mffffffffffffffff,4:00000000",
        "G00",
        "Hgp1.0",
        "qXfer:features:read:target.xml:ffffffffffffffff,ffff",
        "!",
    ] {
        let mut client = connect(&socket)?;
        client.send(packet)?;
        client.close()?;
        assert_eq!(api.get("/")?.json()?["state"], "Running", "{packet}");
    }
    let mut client = connect(&socket)?;
    end_guest(&mut client)?;
    assert_eq!(client.ask("vCont;c")?, "W00");
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    Ok(())
}

#[test]
fn socket_that_cannot_be_created_fails_the_start() -> Result<()> {
    let (mut vmm, mut api, socket) = configured(1)?;
    std::fs::write(&socket, "mine")?;
    let start_action = json!({"action_type": "InstanceStart"});
    let refused = api.put("/actions", &start_action)?;
    assert_eq!(refused.status, 400);
    let fault = refused.fault();
    ensure!(fault.contains("gdb socket") && fault.contains("the path is in use"), "{fault}");
    assert_eq!(std::fs::read(&socket)?, b"mine");
    assert_eq!(api.get("/")?.json()?["state"], "Not started");
    let long = api.patch("/machine-config", &json!({"gdb_socket_path": "x".repeat(108)}))?;
    assert_eq!(long.status, 400);
    ensure!(long.fault().contains("gdb_socket_path is 108 bytes long"), "{}", long.fault());
    std::fs::remove_file(&socket)?;
    api.put("/actions", &start_action)?.ok()?;
    let mut client = connect(&socket)?;
    end_guest(&mut client)?;
    assert_eq!(client.ask("vCont;c")?, "W00");
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    Ok(())
}
