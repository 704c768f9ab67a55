//! Programs of a user who is nobody: not root, without any capability, and without a way to one.
//!
//! What they are to use lies where they can read it: a directory of theirs, with copies of what is elsewhere.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::guest::vmm_path;
use crate::vmm::VmmBuilder;

/// Who it is: `nobody`, who owns no file.
const USER: u32 = 65534;
const KVM: &str = "/dev/kvm";
/// Reading and writing, for a group and for others.
const GROUP: u32 = 0o060;
const OTHERS: u32 = 0o006;

/// `program` with no rights, which ends when the thread that starts it does.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(arguments("--clear-groups")).arg(program);
    command
}

/// What `setpriv` is told, before the program. `groups` is what it is to do about these.
fn arguments(groups: &str) -> [String; 7] {
    [
        format!("--reuid={USER}"),
        format!("--regid={USER}"),
        groups.to_owned(),
        "--bounding-set=-all".to_owned(),
        "--inh-caps=-all".to_owned(),
        "--no-new-privs".to_owned(),
        // The kernel forgets what was set before the user changed.
        "--pdeathsig=KILL".to_owned(),
    ]
}

/// Makes `dir` the user's.
pub fn give(dir: &Path) -> Result<()> {
    chown(dir, Some(USER), Some(USER)).with_context(|| dir.display().to_string())
}

/// A copy of a file in `dir` that the user can read and run.
pub fn copy(file: &Path, dir: &Path) -> Result<PathBuf> {
    let to = dir.join(file.file_name().context("a file with a name")?);
    std::fs::copy(file, &to).with_context(|| file.display().to_string())?;
    std::fs::set_permissions(&to, Permissions::from_mode(0o755))?;
    Ok(to)
}

/// Lets the user use KVM until it is dropped: where a group may, as a member of that, else by opening it to all.
#[derive(Debug)]
pub struct KvmAccess {
    groups: String,
    before: Option<Permissions>,
}

impl KvmAccess {
    /// Needs root.
    pub fn new() -> Result<KvmAccess> {
        let file = std::fs::metadata(KVM).context(KVM)?;
        let (mode, group) = (file.mode(), file.gid());
        let allows = |bits| mode & bits == bits;
        if allows(OTHERS) {
            return Ok(KvmAccess { groups: "--clear-groups".into(), before: None });
        }
        // The group of root is a right, too.
        if allows(GROUP) && group != 0 {
            return Ok(KvmAccess { groups: format!("--groups={group}"), before: None });
        }
        std::fs::set_permissions(KVM, Permissions::from_mode(mode & 0o777 | OTHERS)).context(KVM)?;
        Ok(KvmAccess { groups: "--clear-groups".into(), before: Some(file.permissions()) })
    }

    /// The monitor under test, in a directory of the user's.
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

/// Sees that the kernel knows a process as the user's, who cannot become another.
pub fn check_is_nobody(pid: u32) -> Result<()> {
    let status = Status::of(pid)?;
    for id in ["Uid", "Gid"] {
        let ids: Vec<&str> = status.field(id)?.split_whitespace().collect();
        ensure!(ids.len() == 4 && ids.iter().all(|id| *id == USER.to_string()), "{id}: {ids:?}");
    }
    ensure!(status.field("NoNewPrivs")? == "1", "{}", status.0);
    Ok(())
}

/// Sees that the kernel knows a process as one without capabilities. (They may be those of a user namespace of its own.)
pub fn check_has_no_capability(pid: u32) -> Result<()> {
    let status = Status::of(pid)?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let capabilities = u64::from_str_radix(status.field(set)?, 16)?;
        ensure!(capabilities == 0, "{set}: {capabilities:#x}");
    }
    Ok(())
}

/// `/proc/PID/status`
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
