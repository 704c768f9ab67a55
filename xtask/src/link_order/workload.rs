//! A monitor's life, as far as a guest of a few instructions shows it.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::elf::{Elf, null_guest};
use vesta_tests::guest::{BOOT_ARGS, Guest, start};
use vesta_tests::snapshots::{Files, pause, resume};

use super::tracer::Trace;

/// Longest wait for the API and for the guest. A traced monitor runs a few hundred times slower.
const TIMEOUT: Duration = Duration::from_mins(2);
/// `mov dx, 0x3f8; out dx, al`: writes a byte to the serial port.
const WRITE_TO_SERIAL_PORT: [u8; 5] = [0x66, 0xba, 0xf8, 0x03, 0xee];

/// Runs a monitor that boots, pauses and saves a guest. Its files are in `dir`.
///
/// A load is not part of it: now and then one does not end within minutes under the tracer.
pub(super) fn run(trace: &mut Trace, dir: &Path) -> Result<()> {
    let saved = Files::new(dir, "guest");
    Monitor::new(dir, "first").run(trace, |monitor, api| boot_and_save(monitor, api, &saved))
}

fn boot_and_save(monitor: &Monitor, api: &mut ApiClient, saved: &Files) -> Result<()> {
    let (kernel, disk) = (monitor.file("kernel"), monitor.file("disk"));
    let mut code = WRITE_TO_SERIAL_PORT.to_vec();
    code.extend(null_guest().segments.into_iter().flat_map(|segment| segment.content));
    fs::write(&kernel, Elf::of(&code).bytes())?;
    File::create(&disk)?.set_len(1 << 20)?;

    Guest::bare(&kernel).boot_args(BOOT_ARGS).put(api)?;
    let drive =
        json!({"drive_id": "rootfs", "path_on_host": disk, "is_root_device": true, "is_read_only": false});
    api.put("/drives/rootfs", &drive)?.ok()?;
    api.put("/entropy", &json!({}))?.ok()?;
    api.put("/vsock", &json!({"guest_cid": 3, "uds_path": monitor.file("vsock")}))?.ok()?;
    start(api)?;
    monitor.wait_for_guest()?;
    api.get("/")?.ok()?;
    api.get("/vm/config")?.ok()?;
    pause(api)?;
    resume(api)?;
    pause(api)?;
    api.put("/snapshot/create", &saved.create("Full"))?.ok()?;
    resume(api)?;
    api.get("/")?.ok().map(drop)
}

/// A monitor's files.
struct Monitor {
    dir: PathBuf,
    name: &'static str,
}

impl Monitor {
    fn new(dir: &Path, name: &'static str) -> Monitor {
        Monitor { dir: dir.to_owned(), name }
    }

    fn file(&self, what: &str) -> PathBuf {
        self.dir.join(format!("{}.{what}", self.name))
    }

    /// Runs it until its API has done this, and then ends it as a service manager does.
    fn run(
        &self,
        trace: &mut Trace,
        life: impl FnOnce(&Monitor, &mut ApiClient) -> Result<()> + Send,
    ) -> Result<()> {
        let drive = |process: &OwnedFd| {
            let mut api = ApiClient::new(&self.file("socket"));
            api.wait_ready(TIMEOUT)?;
            life(self, &mut api)?;
            pidfd_send_signal(process, Signal::TERM).context("cannot send SIGTERM")
        };
        trace
            .run(|command| self.arguments(command), drive)
            .with_context(|| format!("{} monitor: its log is:\n{}", self.name, self.log()))
    }

    fn arguments(&self, command: &mut Command) -> Result<()> {
        let log = self.file("log");
        File::create(&log)?;
        command.arg("--api-sock").arg(self.file("socket")).arg("--log-path").arg(log);
        command.current_dir(&self.dir);
        command.stdin(Stdio::null()).stdout(File::create(self.file("serial"))?).stderr(Stdio::inherit());
        Ok(())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    /// Waits until the guest has written to its serial port.
    fn wait_for_guest(&self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while fs::metadata(self.file("serial"))?.len() == 0 {
            if Instant::now() > deadline {
                bail!("the guest has written nothing within {TIMEOUT:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}
