//! Block devices and file systems of the host, which can fail, be slow or be full. They need root.
//!
//! The kernel removes each of them when the process that made it ends for any reason, because only
//! open files keep them.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_string, fsmount, fsopen, fspick,
};

use crate::guest::ignore;
use crate::modules::Modules;

/// Ignores the test if it does not run as root.
fn require_root() {
    if !rustix::process::geteuid().is_root() {
        ignore("it needs root, for block devices and file systems of the host");
    }
}

/// A file as a block device.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    /// The device is detached when its last open file is closed.
    open: Option<File>,
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        self.open = None;
        let name = self.path.file_name().unwrap_or_default();
        wait_until_gone(&Path::new("/sys/block").join(name).join("loop/backing_file"));
    }
}

impl LoopDevice {
    /// Attaches `file`.
    pub fn new(file: &Path) -> Result<LoopDevice> {
        require_root();
        let path = output(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        let path = PathBuf::from(path.trim());
        let open = File::options().read(true).write(true).open(&path);
        // Detaching a device in use marks it to be detached later.
        output(Command::new("losetup").arg("--detach").arg(&path))?;
        Ok(LoopDevice { open: Some(open.with_context(|| path.display().to_string())?), path })
    }

    /// Its device node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A device-mapper device, which can be made to fail or to be slow.
#[derive(Debug)]
pub struct MappedDevice {
    name: String,
    path: PathBuf,
    /// As in [`LoopDevice`].
    open: Option<File>,
    /// The device below it, which is dropped after it.
    below: LoopDevice,
    sectors: u64,
}

impl Drop for MappedDevice {
    fn drop(&mut self) {
        self.open = None;
        wait_until_gone(&Path::new("/sys/block").join(self.path.file_name().unwrap_or_default()));
    }
}

impl MappedDevice {
    /// A device on `file`, without faults.
    pub fn new(file: &Path) -> Result<MappedDevice> {
        let below = LoopDevice::new(file)?;
        let sectors = std::fs::metadata(file)?.len() / 512;
        let name = format!(
            "vesta-test-{}-{}",
            std::process::id(),
            rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_nsec
        );
        let table = good(&below, 0, sectors);
        dmsetup(&["create", &name, "--verifyudev", "--noudevsync"], &table)?;
        let node =
            output(Command::new("dmsetup").args(["info", "--columns", "--noheadings", "-o", "minor", &name]));
        let open = node.and_then(|minor| {
            let path = PathBuf::from(format!("/dev/dm-{}", minor.trim()));
            let open = File::open(&path).with_context(|| path.display().to_string())?;
            Ok((path, open))
        });
        dmsetup(&["remove", "--deferred", &name], "")?;
        let (path, open) = open?;
        Ok(MappedDevice { name, path, open: Some(open), below, sectors })
    }

    /// Its device node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes every access from sector `from` on fail.
    pub fn fail_from(&self, from: u64) -> Result<()> {
        let bad = format!("{from} {} error\n", self.sectors - from);
        self.load(&(good(&self.below, 0, from) + &bad))
    }

    /// Delays every access by so many milliseconds.
    pub fn slow_down(&self, ms: u32) -> Result<()> {
        self.load(&format!("0 {} delay {} 0 {ms}\n", self.sectors, self.below.path().display()))
    }

    /// Removes faults and delays.
    pub fn heal(&self) -> Result<()> {
        self.load(&good(&self.below, 0, self.sectors))
    }

    fn load(&self, table: &str) -> Result<()> {
        dmsetup(&["load", &self.name], table)?;
        dmsetup(&["resume", &self.name], "")
    }
}

/// The line of a table that maps `count` sectors from `first` on to those of `below`.
fn good(below: &LoopDevice, first: u64, count: u64) -> String {
    if count == 0 {
        String::new()
    } else {
        format!("{first} {count} linear {} {first}\n", below.path().display())
    }
}

fn dmsetup(args: &[&str], table: &str) -> Result<()> {
    let mut child = Command::new("dmsetup")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot run dmsetup")?;
    child.stdin.take().context("it is a pipe")?.write_all(table.as_bytes())?;
    ensure!(child.wait()?.success(), "dmsetup {args:?} failed");
    Ok(())
}

/// A `null_blk` device. It keeps its contents in memory, cannot discard, and can be limited in
/// speed.
#[derive(Debug)]
pub struct NullDevice {
    config: PathBuf,
    path: PathBuf,
    /// The mount that `config` is in, which no other process sees.
    _configfs: OwnedFd,
}

impl Drop for NullDevice {
    fn drop(&mut self) {
        let _ = std::fs::write(self.config.join("power"), "0");
        let _ = std::fs::remove_dir(&self.config);
    }
}

impl NullDevice {
    /// A device of `mib` MiB with that many MiB per second; 0 for no limit.
    pub fn new(mib: u64, mib_per_second: u64) -> Result<NullDevice> {
        require_root();
        load_null_blk()?;
        let fs = fsopen("configfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&fs)?;
        let configfs = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let name = format!("vesta-test-{}-{mib}", std::process::id());
        let root = format!("/proc/{}/fd/{}/nullb", std::process::id(), configfs.as_raw_fd());
        let config = Path::new(&root).join(&name);
        std::fs::create_dir(&config).with_context(|| config.display().to_string())?;
        let mut device = NullDevice { config, path: PathBuf::new(), _configfs: configfs };
        let (size, speed) = (mib.to_string(), mib_per_second.to_string());
        for (attribute, value) in
            [("size", &*size), ("memory_backed", "1"), ("mbps", &speed), ("blocksize", "512"), ("power", "1")]
        {
            let file = device.config.join(attribute);
            std::fs::write(&file, value).with_context(|| format!("{} to {value}", file.display()))?;
        }
        // Newer kernels use the name of its configfs directory.
        let named = Path::new("/dev").join(&name);
        let index = std::fs::read_to_string(device.config.join("index"))?;
        device.path =
            if named.exists() { named } else { PathBuf::from(format!("/dev/nullb{}", index.trim())) };
        Ok(device)
    }

    /// Its device node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Loads `null_blk` without a device, from the host's modules.
fn load_null_blk() -> Result<()> {
    const OF_EMULATED_HOST: &str = "/run/vesta-host/modules";
    if Path::new("/sys/module/null_blk").exists() {
        return Ok(());
    }
    let modules = Modules::new(OF_EMULATED_HOST);
    if !modules.file("null_blk").exists() {
        return output(Command::new("modprobe").args(["null_blk", "nr_devices=0"])).map(drop);
    }
    for name in modules.load_order(&["null_blk"])? {
        let params = if name == "null_blk" { c"nr_devices=0" } else { c"" };
        match rustix::system::finit_module(File::open(modules.file(&name))?, params, 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot load the kernel module {name}")),
        }
    }
    Ok(())
}

/// A small file system in memory, not attached to the mount tree.
#[derive(Debug)]
pub struct SmallFs(OwnedFd);

impl SmallFs {
    /// A file system of so many bytes.
    pub fn new(bytes: u64) -> Result<SmallFs> {
        require_root();
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "size", bytes.to_string())?;
        fsconfig_create(&fs)?;
        Ok(SmallFs(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?))
    }

    /// A path to it for other processes, while this value lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// Changes its size.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        let fs = fspick(&self.0, "", FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH)?;
        fsconfig_set_string(&fs, "size", bytes.to_string())?;
        Ok(fsconfig_reconfigure(&fs)?)
    }
}

/// A file system on a block device, not attached to the mount tree.
#[derive(Debug)]
pub struct MountedFs(OwnedFd);

impl MountedFs {
    /// Makes a new ext4 on `device`.
    pub fn ext4(device: &Path) -> Result<MountedFs> {
        require_root();
        output(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(device))?;
        Self::ext4_as_it_is(device)
    }

    /// The existing ext4 on `device`.
    pub fn ext4_as_it_is(device: &Path) -> Result<MountedFs> {
        require_root();
        let fs = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "source", device)?;
        fsconfig_create(&fs).with_context(|| format!("mount {}", device.display()))?;
        Ok(MountedFs(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?))
    }

    /// A path to it for other processes, while this value lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }
}

/// Waits until a file of `/sys` is gone: the kernel removes a device some time after its last user.
/// The test runner reports one that stays.
fn wait_until_gone(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while path.exists() && Instant::now() < deadline {
        // There is no notification.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn output(command: &mut Command) -> Result<String> {
    let what = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| what.clone())?;
    ensure!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
