//! Initramfs images: `newc` cpio archives with busybox, an `/init` script and other files.
//!
//! Busybox's shell runs its applets by name once `/proc` is mounted, so scripts need only
//! `#!/bin/sh`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::modules::Modules;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The beginning of every guest's `/init`.
const PREAMBLE: &str = "\
#!/bin/sh
/bin/busybox mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
";

/// A builder of initramfs images.
#[derive(Debug, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    directories: BTreeSet<String>,
    /// The libraries in it.
    files: BTreeSet<String>,
    inode: u32,
    /// Lines of `/init` before the script.
    preamble: String,
}

impl Initramfs {
    /// An image with busybox (a static program at that path) and empty mount points.
    pub fn new(busybox: &Path) -> Result<Initramfs> {
        let program = std::fs::read(busybox).with_context(|| busybox.display().to_string())?;
        let mut disk = Initramfs { preamble: PREAMBLE.to_owned(), ..Initramfs::default() };
        for name in ["proc", "sys", "dev", "tmp"] {
            disk.directory(name);
        }
        // The kernel opens it for /init before devtmpfs is mounted.
        disk.entry("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
        disk.file("bin/busybox", 0o755, &program);
        disk.entry("bin/sh", SYMLINK | 0o777, (0, 0), b"busybox");
        Ok(disk)
    }

    /// Adds a file and its parent directories. `path` is relative to the guest's root.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> &mut Initramfs {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.entry(path, REGULAR | mode, (0, 0), content);
        self
    }

    /// Adds kernel modules and their dependencies, which `/init` loads before its script.
    pub fn modules(&mut self, modules: &Modules, names: &[&str]) -> Result<&mut Initramfs> {
        for name in modules.load_order(names)? {
            let file = modules.file(&name);
            let image = std::fs::read(&file).with_context(|| file.display().to_string())?;
            self.file(&format!("modules/{name}.ko"), 0o644, &image);
            // Infallible: it writes to a String.
            let _ = writeln!(self.preamble, "insmod /modules/{name}.ko");
        }
        Ok(self)
    }

    /// Adds a program of this machine to `bin`, with its shared libraries.
    pub fn program(&mut self, name: &str) -> Result<&mut Initramfs> {
        let dirs = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        let path = dirs.map(|dir| Path::new(dir).join(name)).into_iter().find(|path| path.is_file());
        let path = path.with_context(|| format!("program {name}: not installed on this machine"))?;
        let libraries = Command::new("ldd").arg(&path).output().context("cannot run ldd")?;
        for library in String::from_utf8(libraries.stdout)?.split_whitespace() {
            if library.starts_with('/') && self.files.insert(library.to_owned()) {
                let content = std::fs::read(library).with_context(|| library.to_owned())?;
                self.file(library.trim_start_matches('/'), 0o755, &content);
            }
        }
        let content = std::fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(self.file(&format!("bin/{name}"), 0o755, &content))
    }

    /// Finishes the archive. The guest runs `script` (lines of shell) as its first process.
    pub fn finish(mut self, script: &str) -> Vec<u8> {
        let init = format!("{}{script}\n", self.preamble);
        self.file("init", 0o755, init.as_bytes());
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.archive
    }

    fn directory(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
        }
    }

    /// Adds a member: a header of hexadecimal numbers, the name and the content, each padded to
    /// four bytes.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("what we put into a guest is smaller than 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("our names are short");
        let (major, minor) = device;
        let header = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        self.archive.extend_from_slice(b"070701");
        for number in header {
            self.archive.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.archive.extend_from_slice(name.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }
}

/// The names in an archive, in order.
pub fn names(archive: &[u8]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut at = 0;
    loop {
        let header = archive.get(at..at + 110).context("the archive ends within a header")?;
        if &header[..6] != b"070701" {
            bail!("no header at offset {at}");
        }
        let field = |index: usize| -> Result<usize> {
            let text = std::str::from_utf8(&header[6 + 8 * index..14 + 8 * index])?;
            Ok(usize::from_str_radix(text, 16)?)
        };
        let (size, name_size) = (field(6)?, field(11)?);
        let name = archive.get(at + 110..at + 110 + name_size).context("the archive ends within a name")?;
        let name = String::from_utf8(name[..name_size - 1].to_vec())?;
        if name == "TRAILER!!!" {
            return Ok(names);
        }
        names.push(name);
        at = (at + 110 + name_size).next_multiple_of(4) + size.next_multiple_of(4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> (tempfile::TempDir, Initramfs) {
        let dir = tempfile::tempdir().unwrap();
        let busybox = dir.path().join("busybox");
        std::fs::write(&busybox, "a program").unwrap();
        let disk = Initramfs::new(&busybox).unwrap();
        (dir, disk)
    }

    #[test]
    fn directories_come_once_and_before_their_contents() {
        let (_dir, mut disk) = disk();
        disk.file("etc/a/one", 0o644, b"1").file("etc/a/two", 0o644, b"22");
        let names = names(&disk.finish("true")).unwrap();
        assert_eq!(
            names,
            [
                "proc",
                "sys",
                "dev",
                "tmp",
                "dev/console",
                "bin",
                "bin/busybox",
                "bin/sh",
                "etc",
                "etc/a",
                "etc/a/one",
                "etc/a/two",
                "init"
            ]
        );
    }

    #[test]
    fn every_member_begins_at_a_multiple_of_four() {
        let (_dir, mut disk) = disk();
        for len in 0..5 {
            disk.file(&"n".repeat(len + 1), 0o644, &vec![b'x'; len]);
            assert_eq!(disk.archive.len() % 4, 0);
        }
    }

    #[test]
    fn the_script_ends_init() {
        let (_dir, disk) = disk();
        let archive = disk.finish("echo hello");
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("devtmpfs none /dev\necho hello\n"), "{text}");
    }

    #[test]
    fn a_missing_busybox_is_named() {
        let error = Initramfs::new(Path::new("/nonexistent/busybox")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/busybox"));
    }
}
