//! Making the name of a new file durable: a file that is on disk is lost with the host if its directory's entry is not.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;

/// Makes the directory entry of the file at `path` durable. Blocks. The entry of a symbolic link's target, where it is one.
///
/// To be called before anything names the file: a configuration, a state file, an answer.
pub fn make_name_durable(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.nlink() == 0 {
        // It has no name: it was inherited, and is named by its descriptor.
        return Ok(());
    }
    let file = path.canonicalize()?;
    let dir = file.parent().unwrap_or(Path::new("/"));
    #[cfg(test)]
    record::note(&file);
    match File::open(dir) {
        Ok(dir) => match rustix::fs::fsync(&dir) {
            // A file system that cannot sync directories.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        },
        // Files can be made in a directory that cannot be read. Then its file system is synced as a whole.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Ok(rustix::fs::syncfs(File::open(&file)?)?)
        }
        Err(error) => Err(error),
    }
}

/// Which names were made durable, for tests.
#[cfg(test)]
pub(super) mod record {
    use std::cell::RefCell;
    use std::path::{Path, PathBuf};

    thread_local! {
        static NAMES: RefCell<Vec<PathBuf>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn note(path: &Path) {
        NAMES.with_borrow_mut(|names| names.push(path.into()));
    }

    /// Those that this thread has made durable since the last call.
    pub(in crate::block) fn take() -> Vec<PathBuf> {
        NAMES.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_links_target_is_the_one_that_is_synced() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("dir/file");
        std::fs::create_dir(home.path().join("dir")).unwrap();
        File::create(&file).unwrap();
        let link = home.path().join("link");
        std::os::unix::fs::symlink("dir/file", &link).unwrap();
        make_name_durable(&link).unwrap();
        assert_eq!(record::take(), [file.canonicalize().unwrap()]);
        assert!(make_name_durable(&home.path().join("missing")).is_err());
    }
}
