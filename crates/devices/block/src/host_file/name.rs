//! Makes the name of a new file durable. A durable file is lost with the host if its directory
//! entry is not durable.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// Most symbolic links that are followed; the kernel's limit.
const MAX_LINKS: usize = 40;

/// Makes the directory entry of the file at `path` durable; that of the target if it is a symbolic
/// link. Blocks.
///
/// Call it before the file is named in a configuration, a state file or a response.
pub fn make_name_durable(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.nlink() == 0 {
        // The file has no name: it is inherited, and `path` is that of its descriptor.
        return Ok(());
    }
    let file = target_of(path);
    #[cfg(test)]
    record::note(&file);
    let dir = match file.parent() {
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
        None => Path::new("/"),
    };
    match File::open(dir) {
        Ok(dir) => match rustix::fs::fsync(&dir) {
            // The file system cannot sync directories.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        },
        // Files can be created in a directory that cannot be read, and a descriptor's link may name
        // a directory that is not visible here. Then the whole file system is synced.
        Err(_) => Ok(rustix::fs::syncfs(File::open(path)?)?),
    }
}

/// The file at `path`, with symbolic links of the last component followed. Links in the directory
/// part, such as those of `/proc`, are left to the kernel.
fn target_of(path: &Path) -> PathBuf {
    let mut target = path.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(link) = std::fs::read_link(&target) else { break };
        target = target.parent().unwrap_or(Path::new("/")).join(link);
    }
    target
}

/// The names that were made durable, for tests.
#[cfg(test)]
pub(crate) mod record {
    use std::cell::RefCell;
    use std::path::{Path, PathBuf};

    thread_local! {
        static NAMES: RefCell<Vec<PathBuf>> = const { RefCell::new(Vec::new()) };
    }

    pub(crate) fn note(path: &Path) {
        NAMES.with_borrow_mut(|names| names.push(path.into()));
    }

    /// The names that this thread has made durable since the last call.
    pub(crate) fn take() -> Vec<PathBuf> {
        NAMES.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_of_a_symlink_target_is_synced() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("dir/file");
        std::fs::create_dir(home.path().join("dir")).unwrap();
        File::create(&file).unwrap();
        let link = home.path().join("link");
        std::os::unix::fs::symlink("dir/file", &link).unwrap();
        make_name_durable(&link).unwrap();
        assert_eq!(record::take(), [file]);
        assert!(make_name_durable(&home.path().join("missing")).is_err());
    }

    /// Directories that only have the path of a descriptor, and files without a name.
    #[test]
    fn names_below_proc_self_fd_are_made_durable() {
        use std::os::fd::AsRawFd;
        let home = tempfile::tempdir().unwrap();
        File::create(home.path().join("file")).unwrap();
        let dir = File::open(home.path()).unwrap();
        make_name_durable(Path::new(&format!("/proc/self/fd/{}/file", dir.as_raw_fd()))).unwrap();
        let unnamed = tempfile::tempfile().unwrap();
        make_name_durable(Path::new(&format!("/proc/self/fd/{}", unnamed.as_raw_fd()))).unwrap();
    }
}
