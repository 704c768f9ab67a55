//! [`NewFiles`]: the empty files of new overlays.
//!
//! They are created before the guest is paused. So a name that cannot be created, or that another
//! microVM takes at the same moment, is found then. Files that are not needed are removed again.
//! The directory entry of a file is durable before a configuration, a state file or an answer names
//! it.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use block::disk::make_name_durable;

use crate::CommandError;

/// Most names that are tried.
const MAX_NAMES: u32 = 100_000;

/// Makes the directory entry of a file durable.
type MakeDurable = fn(&Path) -> std::io::Result<()>;

/// Files that were created for one command. Those that were not kept are removed with this value.
#[derive(Debug)]
pub(crate) struct NewFiles {
    paths: Vec<PathBuf>,
    /// Replaced in tests.
    make_durable: MakeDurable,
}

impl Default for NewFiles {
    fn default() -> Self {
        NewFiles { paths: Vec::new(), make_durable: make_name_durable }
    }
}

impl NewFiles {
    /// Creates a file at a path that the user named. It may exist already if it is empty.
    pub(crate) fn given(&mut self, drive_id: &str, path: &Path) -> Result<PathBuf, CommandError> {
        let failed = |why: &dyn std::fmt::Display| {
            CommandError::drive(drive_id, format!("the overlay {} {why}", path.display()))
        };
        match self.create(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => match std::fs::metadata(path) {
                Ok(file) if file.is_file() && file.len() == 0 => match (self.make_durable)(path) {
                    Ok(()) => Ok(path.to_owned()),
                    Err(error) => Err(failed(&format_args!("cannot be made durable: {error}"))),
                },
                _ => Err(failed(&"exists already")),
            },
            Err(error) => Err(failed(&format_args!("cannot be created: {error}"))),
        }
    }

    /// Creates a file at the first of `STEM.1`, `STEM.2`, ... that does not exist and is not in
    /// `named`.
    pub(crate) fn numbered(
        &mut self,
        drive_id: &str,
        stem: &Path,
        named: &BTreeSet<PathBuf>,
    ) -> Result<PathBuf, CommandError> {
        let failed = |why: &dyn std::fmt::Display| {
            let source = format!("cannot create an overlay beside {}: {why}", stem.display());
            CommandError::drive(drive_id, source)
        };
        for path in (1..MAX_NAMES).map(|number| with_number(stem, number)) {
            if named.contains(&path) {
                continue;
            }
            match self.create(&path) {
                Ok(()) => return Ok(path),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Err(failed(&format_args!("all names up to number {} are taken", MAX_NAMES - 1)))
    }

    fn create(&mut self, path: &Path) -> std::io::Result<()> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        self.paths.push(path.to_owned());
        (self.make_durable)(path)
    }

    /// Keeps the files that are `used`, and removes the others.
    pub(crate) fn keep(mut self, used: impl Fn(&Path) -> bool) {
        self.paths.retain(|path| !used(path));
    }

    /// Keeps the files that have contents, because a monitor has started to use them.
    pub(crate) fn keep_started(self) {
        self.keep(|path| std::fs::metadata(path).is_ok_and(|file| file.len() > 0));
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            // A file that is missing already needs no removal.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// `STEM.NUMBER`.
pub(crate) fn with_number(stem: &Path, number: u32) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    thread_local! {
        static DURABLE: std::cell::RefCell<Vec<PathBuf>> = const { std::cell::RefCell::new(Vec::new()) };
    }

    #[test]
    fn name_of_a_new_file_is_durable_before_it_is_returned() {
        let home = tempfile::tempdir().unwrap();
        let note: MakeDurable = |path| {
            assert!(path.exists());
            DURABLE.with_borrow_mut(|names| names.push(path.to_owned()));
            Ok(())
        };
        let mut files = NewFiles { paths: Vec::new(), make_durable: note };
        let numbered = files.numbered("d", &home.path().join("disk"), &BTreeSet::new()).unwrap();
        let given = files.given("d", &home.path().join("given")).unwrap();
        let empty = home.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        files.given("d", &empty).unwrap();
        assert_eq!(DURABLE.take(), [numbered, given, empty]);
    }

    #[test]
    fn file_whose_name_cannot_be_made_durable_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let fail: MakeDurable = |_| Err(std::io::Error::from_raw_os_error(5));
        let mut files = NewFiles { paths: Vec::new(), make_durable: fail };
        let stem = home.path().join("disk");
        let error = files.numbered("d", &stem, &BTreeSet::new()).unwrap_err();
        assert!(error.to_string().contains("os error 5"), "{error}");
        assert!(files.given("d", &home.path().join("given")).is_err());
        drop(files);
        assert!(names(home.path()).is_empty());
    }

    #[test]
    fn numbered_names_are_unique_and_unkept_files_are_removed() {
        let home = tempfile::tempdir().unwrap();
        let stem = home.path().join("disk.vm");
        let named = BTreeSet::from([with_number(&stem, 2)]);
        let (mut first, mut second) = (NewFiles::default(), NewFiles::default());
        let one = first.numbered("d", &stem, &named).unwrap();
        let other = second.numbered("d", &stem, &named).unwrap();
        assert_eq!([&one, &other], [&with_number(&stem, 1), &with_number(&stem, 3)]);
        first.keep(|path| path == one);
        drop(second);
        assert_eq!(names(home.path()), ["disk.vm.1"]);
    }

    #[test]
    fn given_path_may_be_an_empty_file_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let [empty, full, missing] = ["empty", "full", "missing"].map(|name| home.path().join(name));
        std::fs::write(&empty, "").unwrap();
        std::fs::write(&full, "x").unwrap();
        let mut files = NewFiles::default();
        files.given("d", &empty).unwrap();
        assert!(files.given("d", &full).unwrap_err().to_string().contains("full exists already"));
        assert!(files.given("d", Path::new("/nowhere/o")).unwrap_err().to_string().contains("/nowhere/o"));
        assert!(files.given("d", home.path()).is_err());
        let started = files.given("d", &missing).unwrap();
        std::fs::write(&started, "x").unwrap();
        files.keep_started();
        assert_eq!(names(home.path()), ["empty", "full", "missing"], "what was there stays");
    }
}
