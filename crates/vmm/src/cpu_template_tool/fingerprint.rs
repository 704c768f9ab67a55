//! Fingerprints: what a guest's vCPU shows, with the host's software that it depends on. Comparing
//! an old one with a new one says when a template should be looked at again.

use std::fs;
use std::path::Path;

use config::CpuConfig;
use serde_json::{Map, Value, json};

use super::command::{Field, GuestFiles};
use super::error::ToolError;
use super::{dump, strip};
use crate::crash_report;
use crate::personality::API_VERSION;

/// The fingerprint of this host and a guest.
pub(super) fn dump(files: &GuestFiles) -> Result<Value, ToolError> {
    let shown = json_of(&dump::dump(files)?)?;
    let fields = Field::ALL.map(|field| {
        let value = match field {
            Field::FirecrackerVersion => API_VERSION.into(),
            Field::KernelVersion => rustix::system::uname().release().to_string_lossy().into(),
            Field::MicrocodeVersion => of_host("/sys/devices/system/cpu/cpu0/microcode/version"),
            Field::BiosVersion => of_host("/sys/devices/virtual/dmi/id/bios_version"),
            Field::BiosRevision => of_host("/sys/devices/virtual/dmi/id/bios_release"),
            Field::GuestCpuConfig => shown.clone(),
        };
        (field.name().to_owned(), value)
    });
    Ok(Value::Object(Map::from_iter(fields)))
}

/// A line that the kernel says about the host. A virtual machine may have no such file.
fn of_host(path: &str) -> Value {
    match fs::read_to_string(path) {
        Ok(line) => line.trim_end_matches('\n').into(),
        Err(error) => {
            let warning = format!("Warning: cannot read {path}: {error}; the fingerprint says \"unknown\"\n");
            crash_report::to_stderr(warning.as_bytes());
            "unknown".into()
        }
    }
}

/// Compares `fields` of two fingerprints. The error has those that differ, as JSON.
pub(super) fn compare(previous: &Path, current: &Path, fields: &[Field]) -> Result<(), ToolError> {
    let (old, new) = (read(previous)?, read(current)?);
    let mut differences = Vec::new();
    for field in fields {
        let (before, now) = (value(&old, *field, previous)?, value(&new, *field, current)?);
        let (before, now) = match field {
            Field::GuestCpuConfig => {
                let configs =
                    [(before, previous), (now, current)].map(|(value, path)| cpu_config(value, path));
                let [before, now] = configs;
                let (before, now) = (before?, now?);
                if before == now {
                    continue;
                }
                let stripped = strip::strip(&[before, now]);
                (json_of(&stripped[0])?, json_of(&stripped[1])?)
            }
            _ if before == now => continue,
            _ => (before.clone(), now.clone()),
        };
        differences.push(json!({ "name": field.name(), "prev": before, "curr": now }));
    }
    if differences.is_empty() {
        return Ok(());
    }
    let shown = differences.iter().map(|difference| format!("{difference:#}")).collect::<Vec<_>>();
    Err(ToolError::Difference(shown.join("\n")))
}

fn read(path: &Path) -> Result<Value, ToolError> {
    let failed = |reason: String| ToolError::Fingerprint { path: path.to_owned(), reason };
    let text = fs::read(path).map_err(|e| failed(e.to_string()))?;
    serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))
}

fn value<'a>(of: &'a Value, field: Field, path: &Path) -> Result<&'a Value, ToolError> {
    of.get(field.name()).ok_or_else(|| {
        let reason = format!("{} is missing", field.name());
        ToolError::Fingerprint { path: path.to_owned(), reason }
    })
}

fn cpu_config(value: &Value, path: &Path) -> Result<CpuConfig, ToolError> {
    serde_json::from_value(value.clone()).map_err(|e| ToolError::Fingerprint {
        path: path.to_owned(),
        reason: format!("guest_cpu_config: {e}"),
    })
}

fn json_of(template: &CpuConfig) -> Result<Value, ToolError> {
    serde_json::to_value(template).map_err(|e| ToolError::Output(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path, name: &str, kernel: &str, bitmap: &str) -> std::path::PathBuf {
        let path = dir.join(name);
        let fingerprint = json!({
            "firecracker_version": "1.17.0",
            "kernel_version": kernel,
            "microcode_version": "0x1",
            "bios_version": "1",
            "bios_revision": "2",
            "guest_cpu_config": {"msr_modifiers": [
                {"addr": "0x8b", "bitmap": bitmap},
                {"addr": "0x3a", "bitmap": "0b1"},
            ]},
        });
        fs::write(&path, fingerprint.to_string()).unwrap();
        path
    }

    #[test]
    fn differing_fields_are_shown_as_json() {
        let dir = tempfile::tempdir().unwrap();
        let old = file(dir.path(), "old", "6.1", "0b1100");
        let new = file(dir.path(), "new", "6.18", "0b1010");
        assert!(compare(&old, &old, &Field::ALL).is_ok());
        assert!(compare(&old, &new, &[Field::BiosRevision, Field::MicrocodeVersion]).is_ok());
        let error = compare(&old, &new, &[Field::KernelVersion]).unwrap_err().to_string();
        let json = error.strip_prefix("the fingerprints differ:\n").unwrap();
        let shown: Value = serde_json::from_str(json).unwrap();
        assert_eq!(shown, json!({"name": "kernel_version", "prev": "6.1", "curr": "6.18"}));
        let error = compare(&old, &new, &[Field::GuestCpuConfig]).unwrap_err().to_string();
        let shown: Value = serde_json::from_str(error.split_once('\n').unwrap().1).unwrap();
        let msrs = |side: &str| shown[side]["msr_modifiers"].as_array().unwrap().clone();
        assert_eq!((msrs("prev").len(), msrs("curr").len()), (1, 1));
        assert!(msrs("prev")[0]["bitmap"].as_str().unwrap().ends_with("xx10x"), "{shown}");
        assert!(msrs("curr")[0]["bitmap"].as_str().unwrap().ends_with("xx01x"), "{shown}");
    }

    #[test]
    fn fingerprint_without_a_field_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let good = file(dir.path(), "good", "6.1", "0b1");
        let bad = dir.path().join("bad");
        for (text, named) in [("{}", "kernel_version is missing"), ("{", "EOF")] {
            fs::write(&bad, text).unwrap();
            let error = compare(&good, &bad, &[Field::KernelVersion]).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("bad"), "{error}");
        }
    }
}
