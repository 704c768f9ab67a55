//! Signals that end the monitor: requests to end, and fatal errors.
//!
//! In its own PID namespace the monitor is process 1, to which the kernel applies no default
//! actions.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::process::Signal;
use serde_json::json;
use vesta_tests::counting::{counting_in, counting_with, wait_for_bytes};
use vesta_tests::disks::{disk, drive};
use vesta_tests::elf::null_guest;
use vesta_tests::faults::exhaust_stack;
use vesta_tests::guest::{Guest, TIMEOUT, ignore, vmm_path};
use vesta_tests::process::{Orphans, children};
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// `unshare`, with the options for a PID namespace on this host.
fn unshare() -> Result<VmmBuilder> {
    let options: &[&str] = if rustix::process::geteuid().is_root() {
        &["--pid"]
    } else {
        &["--user", "--map-root-user", "--pid"]
    };
    let possible = Command::new("unshare").args(options).args(["--fork", "true"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        ignore("no PID namespace can be made here (unshare --pid)");
    }
    let program = std::path::Path::new("/usr/bin/unshare");
    Ok(options.iter().fold(VmmBuilder::new(program)?, VmmBuilder::arg))
}

/// A monitor that is process 1 of a PID namespace, with a running guest. The process of the [`Vmm`]
/// is `unshare`, which ends as the monitor does.
fn init() -> Result<(Vmm, Orphans)> {
    let builder =
        unshare()?.arg("--fork").arg("--kill-child").arg(vmm_path()).arg("--no-api").arg("--boot-timer");
    let kernel = builder.dir().join("kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    let vmm = builder.with_config(&Guest::bare(&kernel).config())?.spawn()?;
    vmm.wait_for_output("Guest-boot-time", TIMEOUT)?;
    let monitor = Orphans::of(&children(vmm.pid())?);
    Ok((vmm, monitor))
}

#[test]
fn init_of_a_namespace_exits_with_128_and_the_signal() -> Result<()> {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::QUIT, 131), (Signal::HUP, 156)] {
        let (mut vmm, monitor) = init()?;
        monitor.signal(signal)?;
        let (status, printed) = vmm.finish(TIMEOUT)?;
        ensure!(status == code, "{signal:?}: exit status {status}; output: {printed}");
        ensure!(printed.contains(&format!("exit_code={code}")), "{signal:?}: {printed}");
    }
    Ok(())
}

#[test]
fn fatal_signals_of_init_keep_their_exit_codes() -> Result<()> {
    for (signal, code) in [(Signal::SEGV, 150), (Signal::BUS, 149), (Signal::SYS, 148), (Signal::ABORT, 134)]
    {
        let (mut vmm, monitor) = init()?;
        monitor.signal(signal)?;
        let (status, printed) = vmm.finish(TIMEOUT)?;
        ensure!(status == code, "{signal:?}: exit status {status}; output: {printed}");
    }
    Ok(())
}

/// There is nothing to clean up yet, so the signal takes its default action.
#[test]
fn sigterm_interrupts_reading_an_endless_configuration() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").arg("--config-file");
    let fifo = builder.dir().join("config");
    mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR)?;
    let mut vmm = builder.arg(&fifo).spawn()?;
    let deadline = Instant::now() + TIMEOUT;
    // Only a FIFO with a reader can be opened like this.
    let _writer = loop {
        match rustix::fs::open(&fifo, OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty()) {
            Ok(writer) => break writer,
            Err(_) if Instant::now() < deadline => std::thread::yield_now(),
            Err(error) => bail!("the monitor does not read its configuration: {error}"),
        }
    };
    vmm.signal(Signal::TERM)?;
    let status = vmm.exit_status(TIMEOUT)?;
    ensure!(status.signal() == Some(15), "{status}");
    Ok(())
}

#[test]
fn a_forked_child_of_init_is_killed_by_its_signal() -> Result<()> {
    let builder = unshare()?.arg("--fork").arg("--kill-child").arg(vmm_path());
    let (vmm, mut api, parents_serial) = counting_in(builder)?;
    let (serial, log) = (vmm.dir().join("child.serial"), vmm.dir().join("child.log"));
    let child = json!({
        "id": "child",
        "serial": {"serial_out_path": serial},
        "logger": {"log_path": log},
    });
    api.put("/fork", &json!({"children": [child]}))?.ok()?;
    // The number in the response is that of the namespace.
    let [monitor] = children(vmm.pid())?[..] else { bail!("unshare has one child") };
    // It outlives `unshare` by a moment, so the test waits for its end.
    let _monitor = Orphans::of(&[monitor]);
    let child = Orphans::of(&children(u32::try_from(monitor)?)?);
    ensure!(child.running()? == 1);
    wait_for_bytes(&serial, 10)?;
    child.signal(Signal::TERM)?;
    child.wait(TIMEOUT)?;
    let printed = std::fs::read_to_string(&log)?;
    ensure!(printed.contains("ended by signal 15") && !printed.contains("exit_code"), "{printed}");
    // The parent, which is process 1, continues.
    wait_for_bytes(&parents_serial, 10)?;
    Ok(())
}

#[test]
fn an_exhausted_stack_is_reported_on_every_thread() -> Result<()> {
    let home = tempfile::tempdir()?;
    let drive = drive("d", &disk(home.path(), "disk", 1)?);
    for name in ["main", "fc_api", "fc_vcpu 0", "io 1", "serial"] {
        let (mut vmm, _api, _serial) = counting_with(std::slice::from_ref(&drive))?;
        let threads = vmm.threads()?;
        let named = |thread: &&vesta_tests::vmm::Thread| {
            if name == "main" { thread.id == vmm.pid() } else { thread.name == name }
        };
        let thread = threads.iter().find(named).with_context(|| format!("{name} in {threads:?}"))?;
        exhaust_stack(i32::try_from(thread.id)?)?;
        let status = vmm.exit_status(TIMEOUT)?;
        ensure!(status.code() == Some(150), "{name}: {status}");
        let printed = vmm.stderr.wait_for_end(TIMEOUT)?;
        ensure!(
            printed.contains(&format!("thread {}, address 0x100, stack overflow", thread.name)),
            "{name}: {printed}"
        );
    }
    Ok(())
}
