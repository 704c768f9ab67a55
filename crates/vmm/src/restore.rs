//! The command line's part of restoring: `--restore` and the flags that go with it.

use std::ffi::OsString;
use std::path::PathBuf;

use config::{DriveOverride, Overlay, Serial, SnapshotHugePages, SnapshotLoad};

use crate::args::{ArgsError, once, text};

/// A microVM that goes on from a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Restore {
    pub(crate) load: SnapshotLoad,
    /// Where its serial port leads, if not to standard input and output.
    pub(crate) serial: Option<Serial>,
}

/// The flags, for `--help`.
pub(crate) const FLAGS: [(&str, &str); 8] = [
    ("--restore STATE", "go on with the microVM of this snapshot, at once; needs --memory"),
    ("--memory FILE", "the memory file of the snapshot"),
    ("--drive ID=PATH", "a drive of the snapshot is here now; may be given for each"),
    ("--overlay ID=PATH", "writes to a drive of the snapshot go here now; may be given for each"),
    ("--serial FILE", "the serial port of the snapshot leads to this file or FIFO"),
    ("--track-dirty-pages", "log what the guest writes, for Diff snapshots"),
    ("--clock-realtime", "let the guest's clock catch up with the time that has passed"),
    ("--huge-pages KIND", "back memory with Snapshot (as it was), None, Transparent or 2M"),
];

/// What has been given so far.
#[derive(Debug, Default)]
pub(crate) struct Given {
    state: Option<PathBuf>,
    memory: Option<PathBuf>,
    drives: Vec<DriveOverride>,
    serial: Option<PathBuf>,
    track_dirty_pages: Option<()>,
    clock_realtime: Option<()>,
    huge_pages: Option<SnapshotHugePages>,
    /// The last flag that only means something with `--restore`.
    dependent: Option<&'static str>,
}

impl Given {
    /// Takes the flag `name`, if it is one of these.
    pub(crate) fn take(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<bool, ArgsError> {
        let dependent = match name {
            "restore" => {
                once(&mut self.state, "restore", parser.value()?.into())?;
                return Ok(true);
            }
            "memory" => {
                once(&mut self.memory, "memory", parser.value()?.into())?;
                "memory"
            }
            "drive" => {
                let (drive_id, path) = assignment("drive", parser.value()?)?;
                once(&mut self.drive("drive", drive_id)?.path_on_host, "drive", path)?;
                "drive"
            }
            "overlay" => {
                let (drive_id, path) = assignment("overlay", parser.value()?)?;
                let overlay = Overlay { path, layers: Vec::new(), size_mib: None };
                once(&mut self.drive("overlay", drive_id)?.overlay, "overlay", overlay)?;
                "overlay"
            }
            "serial" => {
                once(&mut self.serial, "serial", parser.value()?.into())?;
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

    /// The restore that was asked for, if any.
    pub(crate) fn into_restore(self) -> Result<Option<Restore>, ArgsError> {
        let Some(state) = self.state else {
            return self.dependent.map_or(Ok(None), |name| Err(ArgsError::OnlyWithRestore(name)));
        };
        let memory = self.memory.ok_or(ArgsError::Missing("--memory, the snapshot's memory file,"))?;
        let serial = self.serial.map(|path| Serial { serial_out_path: Some(path), ..Serial::default() });
        let load = SnapshotLoad {
            track_dirty_pages: self.track_dirty_pages.is_some(),
            clock_realtime: self.clock_realtime.is_some(),
            huge_pages: self.huge_pages.unwrap_or_default(),
            drives: self.drives,
            resume_vm: true,
            ..SnapshotLoad::of_files(state, memory)
        };
        Ok(Some(Restore { load, serial }))
    }

    /// What is changed of a drive.
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

/// `ID=PATH`.
fn assignment(name: &'static str, value: OsString) -> Result<(String, PathBuf), ArgsError> {
    let value = text(name, value)?;
    match value.split_once('=') {
        Some((id, path)) if !id.is_empty() && !path.is_empty() => Ok((id.to_owned(), path.into())),
        _ => Err(ArgsError::Value { name, value, reason: "it must be ID=PATH".to_owned() }),
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
    fn a_restored_guest_runs_at_once_and_is_as_it_was() {
        let restore = restore("--restore s --memory m --no-api").unwrap();
        let wanted = SnapshotLoad { resume_vm: true, ..SnapshotLoad::of_files("s".into(), "m".into()) };
        assert_eq!(restore, Restore { load: wanted, serial: None });
        restore.load.check().unwrap();
    }

    #[test]
    fn what_is_elsewhere_now_is_told_by_drive() {
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
    fn what_cannot_be_meant_is_named() {
        for (line, named) in [
            ("--restore s", "--memory"),
            ("--memory m", "--memory needs --restore"),
            ("--clock-realtime", "--clock-realtime needs --restore"),
            ("--restore s --memory m --config-file c", "--config-file"),
            ("--restore s --memory m --restore t", "--restore is given twice"),
            ("--restore s --memory m --drive a", "ID=PATH"),
            ("--restore s --memory m --drive =x", "ID=PATH"),
            ("--restore s --memory m --drive a=x --drive a=y", "--drive is given twice"),
            ("--restore s --memory m --huge-pages 1G", "1G"),
            ("--no-api", "--restore"),
        ] {
            let error = restore(line).unwrap_err();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
