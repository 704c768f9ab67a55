//! Programs of the user `nobody`, without capabilities or a way to gain any.
//!
//! They run in a directory of their own, with copies of the files that they need.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::guest::vmm_path;
use crate::vmm::VmmBuilder;

/// The user `nobody`.
const USER: u32 = 65534;
const KVM: &str = "/dev/kvm";
/// Permission to read and write, for a group and for others.
const GROUP: u32 = 0o060;
const OTHERS: u32 = 0o006;

/// `program` without privileges. It is killed when the thread that starts it ends.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(arguments("--clear-groups")).arg(program);
    command
}

/// The arguments of `setpriv` before the program. `groups` is its option for groups.
fn arguments(groups: &str) -> [String; 7] {
    [
        format!("--reuid={USER}"),
        format!("--regid={USER}"),
        groups.to_owned(),
        "--bounding-set=-all".to_owned(),
        "--inh-caps=-all".to_owned(),
        "--no-new-privs".to_owned(),
        // The kernel clears the parent-death signal when the user changes.
        "--pdeathsig=KILL".to_owned(),
    ]
}

/// Gives `dir` to the user.
pub fn give(dir: &Path) -> Result<()> {
    chown(dir, Some(USER), Some(USER)).with_context(|| dir.display().to_string())
}

/// Copies a file to `dir`, where the user can read and run it.
pub fn copy(file: &Path, dir: &Path) -> Result<PathBuf> {
    let to = dir.join(file.file_name().context("a file with a name")?);
    std::fs::copy(file, &to).with_context(|| file.display().to_string())?;
    std::fs::set_permissions(&to, Permissions::from_mode(0o755))?;
    Ok(to)
}

/// Lets the user open `/dev/kvm` until it is dropped: as a member of its group, or by permissions
/// for others.
#[derive(Debug)]
pub struct KvmAccess {
    groups: String,
    before: Option<Permissions>,
}

impl KvmAccess {
    /// Grants the access. Needs root.
    pub fn new() -> Result<KvmAccess> {
        let file = std::fs::metadata(KVM).context(KVM)?;
        let (mode, group) = (file.mode(), file.gid());
        let allows = |bits| mode & bits == bits;
        if allows(OTHERS) {
            return Ok(KvmAccess { groups: "--clear-groups".into(), before: None });
        }
        // The group of root would be a privilege.
        if allows(GROUP) && group != 0 {
            return Ok(KvmAccess { groups: format!("--groups={group}"), before: None });
        }
        std::fs::set_permissions(KVM, Permissions::from_mode(mode & 0o777 | OTHERS)).context(KVM)?;
        Ok(KvmAccess { groups: "--clear-groups".into(), before: Some(file.permissions()) })
    }

    /// The monitor under test, in a directory of the user.
    pub fn vmm(&self) -> Result<VmmBuilder> {
        let builder = VmmBuilder::new(Path::new("setpriv"))?;
        give(builder.dir())?;
        let program = copy(&vmm_path(), builder.dir())?;
        Ok(arguments(&self.groups).iter().fold(builder, VmmBuilder::arg).arg(program))
    }
}

impl Drop for KvmAccess {
    fn drop(&mut self) {
        if let Some(before) = self.before.take()
            && let Err(error) = std::fs::set_permissions(KVM, before)
        {
            eprintln!("{KVM} stays open to all: {error}");
        }
    }
}

/// Checks that a process belongs to the user and cannot change that.
pub fn check_is_nobody(pid: u32) -> Result<()> {
    let status = Status::of(pid)?;
    for id in ["Uid", "Gid"] {
        let ids: Vec<&str> = status.field(id)?.split_whitespace().collect();
        ensure!(ids.len() == 4 && ids.iter().all(|id| *id == USER.to_string()), "{id}: {ids:?}");
    }
    ensure!(status.field("NoNewPrivs")? == "1", "{}", status.0);
    Ok(())
}

/// Checks that a process has no capabilities. (It may have some in a user namespace of its own.)
pub fn check_has_no_capability(pid: u32) -> Result<()> {
    let status = Status::of(pid)?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let capabilities = u64::from_str_radix(status.field(set)?, 16)?;
        ensure!(capabilities == 0, "{set}: {capabilities:#x}");
    }
    Ok(())
}

/// The content of `/proc/PID/status`.
struct Status(String);

impl Status {
    fn of(pid: u32) -> Result<Status> {
        let path = format!("/proc/{pid}/status");
        Ok(Status(std::fs::read_to_string(&path).context(path)?))
    }

    fn field(&self, name: &str) -> Result<&str> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim).with_context(|| format!("no {name} in {}", self.0))
    }
}
