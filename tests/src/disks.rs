//! Guests with disks, and files for the disks.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guest::{BOOT_ARGS, BOOT_TIMEOUT, Guest, Kernel, Transport, busybox, vmm_path};
use crate::initramfs::Initramfs;
use crate::pattern::Stream;
use crate::vmm::{Vmm, VmmBuilder};

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// A builder of guests with disks.
#[derive(Debug)]
pub struct DiskGuest {
    builder: VmmBuilder,
    guest: Guest,
    programs: Vec<(String, PathBuf)>,
    drives: Vec<Value>,
    devices: Vec<(String, Value)>,
}

impl DiskGuest {
    /// A guest with one vCPU and no disks yet.
    pub fn new(transport: Transport) -> Result<DiskGuest> {
        let args = transport.args().iter();
        let builder = args.fold(VmmBuilder::new(&vmm_path())?.with_api(), VmmBuilder::arg);
        let guest = Guest::bare(&Kernel::Tuned.image()).boot_args(BOOT_ARGS);
        Ok(DiskGuest { builder, guest, programs: Vec::new(), drives: Vec::new(), devices: Vec::new() })
    }

    /// The monitor's directory, for the disks.
    pub fn dir(&self) -> &Path {
        self.builder.dir()
    }

    /// Adds this program to the guest as `disk-tool`.
    #[must_use]
    pub fn tool(self, program: impl Into<PathBuf>) -> DiskGuest {
        self.program("disk-tool", program)
    }

    /// Adds a program to the guest by this name.
    #[must_use]
    pub fn program(mut self, name: &str, program: impl Into<PathBuf>) -> DiskGuest {
        self.programs.push((name.to_owned(), program.into()));
        self
    }

    /// Sets the number of vCPUs.
    #[must_use]
    pub fn vcpus(self, vcpus: u32) -> DiskGuest {
        DiskGuest { guest: self.guest.vcpus(vcpus), ..self }
    }

    /// Sets the size of memory.
    #[must_use]
    pub fn mem_mib(self, mem_mib: u32) -> DiskGuest {
        DiskGuest { guest: self.guest.mem_mib(mem_mib), ..self }
    }

    /// Adds these fields to `machine-config`.
    #[must_use]
    pub fn machine(self, machine: Value) -> DiskGuest {
        DiskGuest { guest: Guest { machine, ..self.guest }, ..self }
    }

    /// Adds a drive: see [`drive`].
    #[must_use]
    pub fn drive(mut self, drive: Value) -> DiskGuest {
        self.drives.push(drive);
        self
    }

    /// Adds an entropy device.
    #[must_use]
    pub fn entropy(self, entropy: Value) -> DiskGuest {
        self.device("entropy", entropy)
    }

    /// Adds a section to the configuration file.
    #[must_use]
    pub fn device(mut self, section: &str, value: Value) -> DiskGuest {
        self.devices.push((section.to_owned(), value));
        self
    }

    /// Appends to the kernel command line.
    #[must_use]
    pub fn more_boot_args(mut self, args: &str) -> DiskGuest {
        self.guest.boot_args = Some(format!("{BOOT_ARGS} {args}"));
        self
    }

    /// Runs the monitor as on a host kernel without `io_uring`.
    #[must_use]
    pub fn without_io_uring(self) -> DiskGuest {
        DiskGuest { builder: self.builder.without_io_uring(), ..self }
    }

    /// Boots the guest. It runs `script` from its initramfs.
    pub fn run(mut self, script: &str) -> Result<Vmm> {
        let mut disk = Initramfs::new(&busybox())?;
        for (name, path) in &self.programs {
            let program = fs::read(path).with_context(|| path.display().to_string())?;
            // In the shell's PATH.
            disk.file(&format!("sbin/{name}"), 0o755, &program);
        }
        let started = Guest::with_initramfs(Kernel::Tuned, disk, script, self.builder.dir())?;
        self.guest.initrd = started.initrd;
        self.boot()
    }

    /// Boots the guest. It runs `/sbin/init` of its root disk.
    pub fn boot(self) -> Result<Vmm> {
        let mut config = self.guest.config();
        config["drives"] = json!(self.drives);
        for (section, value) in self.devices {
            config[section] = value;
        }
        self.builder.with_config(&config)?.spawn()
    }
}

/// Waits for the guest's end, which must be a success, and returns its output.
pub fn output_of(vmm: &mut Vmm) -> Result<String> {
    let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
    ensure!(code == 0, "exit code {code}; output:\n{output}");
    Ok(output)
}

/// A sparse file of `mib` MiB.
pub fn disk(dir: &Path, name: &str, mib: u64) -> Result<PathBuf> {
    let path = dir.join(name);
    File::create(&path)
        .and_then(|file| file.set_len(mib * MIB))
        .with_context(|| path.display().to_string())?;
    Ok(path)
}

/// A drive that is not the root device.
pub fn drive(id: &str, path: &Path) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false})
}

/// The root device.
pub fn root_drive(path: &Path) -> Value {
    json!({"drive_id": "rootfs", "path_on_host": path, "is_root_device": true})
}

/// `drive` with these fields added or replaced.
pub fn with(mut drive: Value, fields: &Value) -> Value {
    for (key, value) in fields.as_object().into_iter().flatten() {
        drive[key] = value.clone();
    }
    drive
}

/// Reads bytes of a file.
pub fn bytes_at(path: &Path, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut bytes, offset));
    read.with_context(|| path.display().to_string())?;
    Ok(bytes)
}

/// A reader of overlay files, written from the documentation of their format.
#[derive(Debug)]
pub struct OverlayFile {
    path: PathBuf,
    /// The length of each of its two maps, in bytes.
    map_len: u64,
}

impl OverlayFile {
    const MAPS: u64 = 8192;

    /// The overlay at `path`.
    pub fn open(path: &Path) -> Result<OverlayFile> {
        let header = bytes_at(path, 0, 24)?;
        ensure!(header.starts_with(b"VESTAOVL"), "{} is not an overlay", path.display());
        let size = u64::from_le_bytes(header[16..].try_into()?);
        Ok(OverlayFile { path: path.into(), map_len: size.div_ceil(512 * 32768) * 4096 })
    }

    /// Whether its last session was closed.
    pub fn is_closed(&self) -> Result<bool> {
        Ok(bytes_at(&self.path, 4096 + 32, 4)? == [3, 0, 0, 0])
    }

    /// Whether one of its maps has this sector.
    pub fn holds(&self, sector: u64) -> Result<bool> {
        let byte = Self::MAPS + sector / 8;
        let maps = [byte, byte + self.map_len].map(|at| bytes_at(&self.path, at, 1));
        Ok(maps.into_iter().collect::<Result<Vec<_>>>()?.iter().any(|byte| byte[0] >> (sector % 8) & 1 == 1))
    }

    /// Whether its first map, which is for durable data only, has this sector.
    pub fn is_durable(&self, sector: u64) -> Result<bool> {
        Ok(bytes_at(&self.path, Self::MAPS + sector / 8, 1)?[0] >> (sector % 8) & 1 == 1)
    }

    /// Its data at that sector.
    pub fn bytes(&self, sector: u64, len: usize) -> Result<Vec<u8>> {
        let data = (Self::MAPS + 2 * self.map_len).next_multiple_of(MIB);
        bytes_at(&self.path, data + sector * 512, len)
    }
}

/// The allocated size of a file, in bytes.
pub fn space_of(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(path).with_context(|| path.display().to_string())?.blocks() * 512)
}

/// Checks the data that `disk-tool run` has left in a file: see [`Stream::check`].
pub fn check_file(path: &Path, seed: u64, counts: &[u64]) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let sectors = file.metadata()?.len() / 512;
    for (stream, &count) in Stream::all(seed, sectors, counts.len() as u64).iter().zip(counts) {
        let held = stream.check(count, |sector, bytes| file.read_exact_at(bytes, sector * 512));
        let held = held.map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))?;
        ensure!(held > 0, "{}: nothing was written", path.display());
    }
    Ok(())
}

/// How many writes of each stream `disk-tool run DEV` has reported as flushed.
pub fn flushed(output: &str, dev: &str, writers: usize) -> Vec<u64> {
    let mut counts = vec![0; writers];
    let mark = format!("FLUSHED {dev} ");
    for line in output.lines().filter_map(|line| line.split_once(&mark)) {
        let mut numbers = line.1.split_whitespace().map(str::parse::<u64>);
        // The last line may be cut off where the monitor was killed.
        if let (Some(Ok(stream)), Some(Ok(count))) = (numbers.next(), numbers.next())
            && let Some(most) = counts.get_mut(stream as usize)
        {
            *most = count.max(*most);
        }
    }
    counts
}

/// Makes an ext4 file system of 32 MiB whose `/sbin/init` is a shell script.
pub fn root_disk(dir: &Path, script: &str) -> Result<PathBuf> {
    let tree = dir.join("tree");
    for sub in ["bin", "sbin", "dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(tree.join(sub))?;
    }
    fs::copy(busybox(), tree.join("bin/busybox"))?;
    let init = format!("#!/bin/busybox sh\n/bin/busybox mount -t proc none /proc\n{script}\n");
    fs::write(tree.join("sbin/init"), init)?;
    for program in ["bin/busybox", "sbin/init"] {
        fs::set_permissions(tree.join(program), PermissionsExt::from_mode(0o755))?;
    }
    let image = disk(dir, "root.ext4", 32)?;
    let made = Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).status();
    ensure!(made.context("mke2fs")?.success(), "mke2fs failed");
    Ok(image)
}

/// Makes a disk with a DOS partition table, whose one partition is a copy of `image`. Its PARTUUID
/// is `id` in hexadecimal and `-01`.
pub fn partitioned(image: &Path, id: u32) -> Result<PathBuf> {
    const FIRST: u32 = 2048;
    let content = fs::read(image).with_context(|| image.display().to_string())?;
    let sectors = u32::try_from(content.len() / 512)?;
    let mut table = [0; 512];
    table[440..444].copy_from_slice(&id.to_le_bytes());
    let entry = &mut table[446..462];
    // All ones in cylinder, head and sector: the LBA fields below are valid.
    entry[1..4].fill(0xff);
    entry[4] = 0x83;
    entry[5..8].fill(0xff);
    entry[8..12].copy_from_slice(&FIRST.to_le_bytes());
    entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let path = image.with_extension("partitioned");
    let disk = File::create(&path).with_context(|| path.display().to_string())?;
    disk.write_all_at(&table, 0)?;
    disk.write_all_at(&content, u64::from(FIRST) * 512)?;
    Ok(path)
}
