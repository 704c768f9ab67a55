//! Saving microVMs, and restoring them in other monitors.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::api::{ApiClient, Response};
use crate::disks::with;
use crate::guest::{BOOT_TIMEOUT, TIMEOUT, Transport, vmm_path};
use crate::vmm::{Vmm, VmmBuilder};

/// The two files of a snapshot.
#[derive(Debug, Clone)]
pub struct Files {
    /// The state file.
    pub state: PathBuf,
    /// The memory file.
    pub memory: PathBuf,
}

impl Files {
    /// `NAME.state` and `NAME.memory` in `dir`.
    pub fn new(dir: &Path, name: &str) -> Files {
        let part = |part| dir.join(format!("{name}.{part}"));
        Files { state: part("state"), memory: part("memory") }
    }

    /// The body of `PUT /snapshot/create`.
    pub fn create(&self, kind: &str) -> Value {
        json!({"snapshot_path": self.state, "mem_file_path": self.memory, "snapshot_type": kind})
    }

    /// The body of a `PUT /snapshot/load` that resumes the guest.
    pub fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state,
            "mem_backend": {"backend_type": "File", "backend_path": self.memory},
            "resume_vm": true,
        })
    }
}

/// Pauses the guest.
pub fn pause(api: &mut ApiClient) -> Result<()> {
    api.patch("/vm", &json!({"state": "Paused"}))?.ok().map(drop)
}

/// Resumes the guest.
pub fn resume(api: &mut ApiClient) -> Result<()> {
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok().map(drop)
}

/// A monitor without a configured guest, for devices on that transport.
pub fn unconfigured(transport: Transport) -> Result<(Vmm, ApiClient)> {
    let args = transport.args().iter();
    let vmm = args.fold(VmmBuilder::new(&vmm_path())?.with_api(), VmmBuilder::arg).spawn()?;
    let api = vmm.ready_client(TIMEOUT)?;
    Ok((vmm, api))
}

/// Restores a snapshot in a new monitor, with the guest's output on its standard output.
pub fn restore(transport: Transport, load: &Value) -> Result<(Vmm, ApiClient)> {
    let (vmm, mut api) = unconfigured(transport)?;
    api.put("/snapshot/load", load).and_then(Response::ok).context("/snapshot/load")?;
    Ok((vmm, api))
}

/// Waits until the live snapshot has ended. Returns its last description.
pub fn wait_for_live_snapshot(api: &mut ApiClient) -> Result<Value> {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    loop {
        let job = api.get("/snapshot/job")?.ok()?.json()?;
        if job["state"] != "Running" {
            return Ok(job);
        }
        ensure!(Instant::now() < deadline, "the live snapshot has not ended: {job}");
        // There is no notification.
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Saves a running guest, and waits until that is done.
pub fn save_live(api: &mut ApiClient, create: &Value) -> Result<()> {
    api.put("/snapshot/create", &with(create.clone(), &json!({"live": true})))?.ok()?;
    let job = wait_for_live_snapshot(api)?;
    ensure!(job["state"] == "Done", "{job}");
    Ok(())
}

/// A copy of a file with its holes.
pub fn copy(from: &Path, to: &Path) -> Result<PathBuf> {
    use rustix::fs::{SeekFrom, seek};
    let copied = || -> std::io::Result<()> {
        let (source, target) = (File::open(from)?, File::create(to)?);
        target.set_len(source.metadata()?.len())?;
        let mut at = 0;
        // ENXIO: no more data.
        while let Ok(start) = seek(&source, SeekFrom::Data(at)) {
            let end = seek(&source, SeekFrom::Hole(start))?;
            seek(&source, SeekFrom::Start(start))?;
            seek(&target, SeekFrom::Start(start))?;
            std::io::copy(&mut std::io::Read::take(&source, end - start), &mut &target)?;
            at = end;
        }
        Ok(())
    };
    copied().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(to.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn a_copy_keeps_bytes_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        let file = File::create(&from).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"here", 1 << 20).unwrap();
        file.write_all_at(b"and there", 5 << 20).unwrap();
        let to = copy(&from, &dir.path().join("to")).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }
}
