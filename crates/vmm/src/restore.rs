//! `--restore` and the flags that belong to it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use config::{
    DriveOverride, MemoryBackend, MemoryBackendType, NetworkOverride, Overlay, Serial, SnapshotHugePages,
    SnapshotLoad, VsockOverride,
};
use serde_json::{Value, json};

use crate::flags::{ArgsError, Parser, once, text};

/// A snapshot to restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Restore {
    pub(crate) load: SnapshotLoad,
    /// The host end of its serial port, if not standard input and output.
    pub(crate) serial: Option<Serial>,
}

/// The flags, for `--help`.
pub(crate) const FLAGS: [(&str, &str); 14] = [
    (
        "--restore STATE",
        "restore the microVM of this snapshot and let it run; needs --memory or --page-server",
    ),
    ("--memory FILE", "the memory file of the snapshot"),
    ("--page-server SOCKET", "the snapshot's memory comes from the page server at this socket"),
    ("--paused", "leave the restored microVM paused until it is resumed"),
    ("--tap ID=TAP", "put a network interface of the snapshot on this tap; may be given for each"),
    ("--vsock SOCKET", "create the socket of the snapshot's vsock device here"),
    ("--prefetch", "record the pages that the guest touches first, or load them ahead of it"),
    ("--overrides JSON", "other fields of PUT /snapshot/load, as an object; flags take precedence"),
    ("--drive ID=PATH", "use this disk for a drive of the snapshot; may be given for each"),
    ("--overlay ID=PATH", "write to this overlay for a drive of the snapshot; may be given for each"),
    ("--serial FILE", "connect the serial port to this file or FIFO"),
    ("--track-dirty-pages", "track the pages that the guest writes, for Diff snapshots"),
    ("--clock-realtime", "advance the guest's clock by the time that has passed"),
    ("--huge-pages KIND", "pages that back memory: Snapshot (as saved), None, Transparent or 2M"),
];

/// The flags that were read so far.
#[derive(Debug, Default)]
pub(crate) struct RawRestoreArgs {
    state: Option<PathBuf>,
    memory: Option<PathBuf>,
    page_server: Option<PathBuf>,
    paused: Option<()>,
    taps: Vec<(String, String)>,
    vsock: Option<PathBuf>,
    prefetch: Option<()>,
    overrides: Option<Value>,
    drives: Vec<DriveOverride>,
    serial: Option<PathBuf>,
    track_dirty_pages: Option<()>,
    clock_realtime: Option<()>,
    huge_pages: Option<SnapshotHugePages>,
    /// The last flag that needs `--restore`.
    dependent: Option<&'static str>,
}

impl RawRestoreArgs {
    /// Reads the flag `name`. False if it is none of these.
    pub(crate) fn take(&mut self, name: &str, parser: &mut Parser) -> Result<bool, ArgsError> {
        let dependent = match name {
            "restore" => {
                once(&mut self.state, "restore", parser.value()?.into())?;
                return Ok(true);
            }
            "memory" => {
                once(&mut self.memory, "memory", parser.value()?.into())?;
                "memory"
            }
            "page-server" => {
                once(&mut self.page_server, "page-server", parser.value()?.into())?;
                "page-server"
            }
            "paused" => {
                once(&mut self.paused, "paused", ())?;
                "paused"
            }
            "tap" => {
                let (id, tap) = assignment("tap", parser.value()?)?;
                if self.taps.iter().any(|(other, _)| *other == id) {
                    return Err(ArgsError::Duplicate("tap"));
                }
                self.taps.push((id, tap));
                "tap"
            }
            "vsock" => {
                once(&mut self.vsock, "vsock", text("vsock", parser.value()?)?.into())?;
                "vsock"
            }
            "prefetch" => {
                once(&mut self.prefetch, "prefetch", ())?;
                "prefetch"
            }
            "overrides" => {
                once(&mut self.overrides, "overrides", object("overrides", parser.value()?)?)?;
                "overrides"
            }
            "drive" => {
                let (drive_id, path) = assignment("drive", parser.value()?)?;
                once(&mut self.drive("drive", drive_id)?.path_on_host, "drive", path.into())?;
                "drive"
            }
            "overlay" => {
                let (drive_id, path) = assignment("overlay", parser.value()?)?;
                let overlay = Overlay { path: path.into(), layers: Vec::new(), size_mib: None };
                once(&mut self.drive("overlay", drive_id)?.overlay, "overlay", overlay)?;
                "overlay"
            }
            "serial" => {
                once(&mut self.serial, "serial", text("serial", parser.value()?)?.into())?;
                "serial"
            }
            "track-dirty-pages" => {
                once(&mut self.track_dirty_pages, "track-dirty-pages", ())?;
                "track-dirty-pages"
            }
            "clock-realtime" => {
                once(&mut self.clock_realtime, "clock-realtime", ())?;
                "clock-realtime"
            }
            "huge-pages" => {
                once(&mut self.huge_pages, "huge-pages", huge_pages(parser.value()?)?)?;
                "huge-pages"
            }
            _ => return Ok(false),
        };
        self.dependent = Some(dependent);
        Ok(true)
    }

    /// The snapshot to restore, if the flags name one.
    pub(crate) fn into_restore(self) -> Result<Option<Restore>, ArgsError> {
        let Some(state) = self.state else {
            return self.dependent.map_or(Ok(None), |name| Err(ArgsError::OnlyWithRestore(name)));
        };
        let mem_backend = match (self.memory, self.page_server) {
            (Some(path), None) => MemoryBackend { backend_type: MemoryBackendType::File, backend_path: path },
            (None, Some(path)) => MemoryBackend { backend_type: MemoryBackendType::Uffd, backend_path: path },
            _ => return Err(ArgsError::Missing("one of --memory and --page-server")),
        };
        let serial = self.serial.map(|path| Serial { serial_out_path: Some(path), ..Serial::default() });
        let mut load = overridden(state, mem_backend, self.overrides)?;
        load.resume_vm = self.paused.is_none();
        load.track_dirty_pages |= self.track_dirty_pages.is_some();
        load.clock_realtime |= self.clock_realtime.is_some();
        load.prefetch |= self.prefetch.is_some();
        load.huge_pages = self.huge_pages.unwrap_or(load.huge_pages);
        for drive in self.drives {
            load.drives.retain(|other| other.drive_id != drive.drive_id);
            load.drives.push(drive);
        }
        for (iface_id, tap) in self.taps {
            load.network_overrides.retain(|other| other.iface_id != iface_id);
            load.network_overrides.push(on_tap(&iface_id, &tap)?);
        }
        if let Some(path) = self.vsock {
            load.vsock_override = Some(at_socket(&path)?);
        }
        load.check().map_err(|e| ArgsError::Value {
            name: "restore",
            value: load.snapshot_path.display().to_string(),
            reason: e.to_string(),
        })?;
        Ok(Some(Restore { load, serial }))
    }

    /// The override of a drive, to which the flag `name` adds.
    fn drive(&mut self, name: &'static str, drive_id: String) -> Result<&mut DriveOverride, ArgsError> {
        let at = match self.drives.iter().position(|drive| drive.drive_id == drive_id) {
            Some(at) => at,
            None => {
                self.drives.push(DriveOverride { drive_id, path_on_host: None, overlay: None });
                self.drives.len() - 1
            }
        };
        self.drives.get_mut(at).ok_or(ArgsError::Duplicate(name))
    }
}

/// The load that `overrides` describes: the body of `PUT /snapshot/load` without the fields that
/// have a flag.
fn overridden(
    state: PathBuf,
    memory: MemoryBackend,
    overrides: Option<Value>,
) -> Result<SnapshotLoad, ArgsError> {
    let mut load =
        SnapshotLoad { mem_backend: Some(memory), ..SnapshotLoad::from_files(state, PathBuf::new()) };
    let Some(mut overrides) = overrides else { return Ok(load) };
    let refused = |reason| ArgsError::Value { name: "overrides", value: overrides.to_string(), reason };
    for (field, flag) in FIELDS_WITH_FLAGS {
        if overrides.get(field).is_some() {
            return Err(refused(format!("{field} is set by {flag}")));
        }
    }
    let text = overrides.to_string();
    overrides["snapshot_path"] = json!(load.snapshot_path);
    overrides["mem_backend"] = json!(load.mem_backend);
    load = serde_json::from_value(overrides).map_err(|e| ArgsError::Value {
        name: "overrides",
        value: text,
        reason: e.to_string(),
    })?;
    load.resolve_deprecated();
    Ok(load)
}

/// Fields that a load requires, or whose default is another one here, and their flags.
const FIELDS_WITH_FLAGS: [(&str, &str); 4] = [
    ("snapshot_path", "--restore"),
    ("mem_backend", "--memory or --page-server"),
    ("mem_file_path", "--memory"),
    ("resume_vm", "--paused"),
];

/// An override that puts an interface on this tap.
fn on_tap(iface_id: &str, tap: &str) -> Result<NetworkOverride, ArgsError> {
    let fields = json!({"iface_id": iface_id, "host_dev_name": tap});
    serde_json::from_value(fields).map_err(|e| ArgsError::Value {
        name: "tap",
        value: format!("{iface_id}={tap}"),
        reason: e.to_string(),
    })
}

/// An override that puts the vsock device's socket at `path`.
fn at_socket(path: &Path) -> Result<VsockOverride, ArgsError> {
    serde_json::from_value(json!({ "uds_path": path })).map_err(|e| ArgsError::Value {
        name: "vsock",
        value: path.display().to_string(),
        reason: e.to_string(),
    })
}

/// Parses a JSON object.
fn object(name: &'static str, value: OsString) -> Result<Value, ArgsError> {
    let value = text(name, value)?;
    match serde_json::from_str(&value) {
        Ok(object @ Value::Object(_)) => Ok(object),
        Ok(_) => Err(ArgsError::Value { name, value, reason: "it must be a JSON object".to_owned() }),
        Err(e) => Err(ArgsError::Value { name, value, reason: e.to_string() }),
    }
}

/// Parses `ID=VALUE`.
fn assignment(name: &'static str, value: OsString) -> Result<(String, String), ArgsError> {
    let value = text(name, value)?;
    match value.split_once('=') {
        Some((id, assigned)) if !id.is_empty() && !assigned.is_empty() => {
            Ok((id.to_owned(), assigned.to_owned()))
        }
        _ => Err(ArgsError::Value { name, value, reason: "it must be ID=VALUE".to_owned() }),
    }
}

fn huge_pages(value: OsString) -> Result<SnapshotHugePages, ArgsError> {
    let value = text("huge-pages", value)?;
    serde_json::from_value(value.clone().into()).map_err(|_| ArgsError::Value {
        name: "huge-pages",
        value,
        reason: "it must be Snapshot, None, Transparent or 2M".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Invocation, parse};

    fn restore(line: &str) -> Result<Restore, String> {
        let line = format!("vesta-vmm {line}");
        match parse(line.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())? {
            Invocation::Run(args) => args.restore.ok_or_else(|| "it restores nothing".to_owned()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn restored_guest_runs_at_once_without_overrides() {
        let restore = restore("--restore s --memory m --no-api").unwrap();
        let wanted = SnapshotLoad { resume_vm: true, ..SnapshotLoad::from_files("s".into(), "m".into()) };
        assert_eq!(restore, Restore { load: wanted, serial: None });
        restore.load.check().unwrap();
    }

    #[test]
    fn drive_flags_override_each_drive() {
        let line = "--restore=s --memory=m --drive a=/x=y --overlay a=/o --drive b=/z --serial c --huge-pages 2M \
                    --track-dirty-pages --clock-realtime";
        let Restore { load, serial } = restore(line).unwrap();
        let overlay = Some(Overlay { path: "/o".into(), layers: vec![], size_mib: None });
        assert_eq!(
            load.drives,
            [
                DriveOverride { drive_id: "a".into(), path_on_host: Some("/x=y".into()), overlay },
                DriveOverride { drive_id: "b".into(), path_on_host: Some("/z".into()), overlay: None },
            ]
        );
        assert_eq!(serial.unwrap().serial_out_path, Some("c".into()));
        assert!(load.track_dirty_pages && load.clock_realtime);
        assert_eq!(load.huge_pages, SnapshotHugePages::Hugetlbfs2M);
    }

    #[test]
    fn overrides_take_all_fields_and_flags_take_precedence() {
        let json = r#"{"network_overrides":[{"iface_id":"a","host_dev_name":"t1"},{"iface_id":"b","host_dev_name":"t2"}],"huge_pages":"None","enable_diff_snapshots":true}"#;
        let line = format!(
            "--restore s --page-server p --overrides {json} --tap a=t3 --vsock v.sock --huge-pages Transparent --paused"
        );
        let load = restore(&line).unwrap().load;
        let taps: Vec<_> = load
            .network_overrides
            .iter()
            .map(|n| (n.iface_id.as_str(), n.host_dev_name.as_deref()))
            .collect();
        assert_eq!(taps, [("b", Some("t2")), ("a", Some("t3"))]);
        assert_eq!(load.memory(), (MemoryBackendType::Uffd, Path::new("p")));
        assert_eq!(load.vsock_override.unwrap().uds_path.to_str(), Some("v.sock"));
        assert_eq!(load.huge_pages, SnapshotHugePages::Transparent);
        assert!(!load.resume_vm && load.track_dirty_pages && !load.prefetch);
        assert!(restore("--restore s --memory m --prefetch").unwrap().load.prefetch);
    }

    #[test]
    fn invalid_flags_are_named() {
        for (line, named) in [
            ("--restore s", "--memory"),
            ("--restore s --memory m --page-server p", "--page-server"),
            ("--restore s --page-server p --prefetch", "prefetch"),
            ("--restore s --memory m --overrides 1", "JSON object"),
            ("--restore s --memory m --overrides {", "--overrides"),
            ("--restore s --memory m --overrides {\"nothing\":1}", "nothing"),
            ("--restore s --memory m --overrides {\"resume_vm\":false}", "--paused"),
            ("--restore s --memory m --tap a=b --tap a=c", "--tap is given twice"),
            ("--tap a=b", "--tap needs --restore"),
            ("--memory m", "--memory needs --restore"),
            ("--clock-realtime", "--clock-realtime needs --restore"),
            ("--restore s --memory m --config-file c", "--config-file"),
            ("--restore s --memory m --restore t", "--restore is given twice"),
            ("--restore s --memory m --drive a", "ID=VALUE"),
            ("--restore s --memory m --drive =x", "ID=VALUE"),
            ("--restore s --memory m --drive a=x --drive a=y", "--drive is given twice"),
            ("--restore s --memory m --huge-pages 1G", "1G"),
            ("--no-api", "--restore"),
        ] {
            let error = restore(line).unwrap_err();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
