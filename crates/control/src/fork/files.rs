//! Files for new overlays: made empty before anything stops, so that a name that cannot be had, or that another microVM takes in this very
//! moment, is found then; removed again where they are not needed. Their names are durable before anything names them: a configuration, a state file, an answer.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use block::disk::make_name_durable;

use crate::CommandError;

/// Most tries for a free name.
const MAX_NAMES: u32 = 100_000;

/// Makes the name of a file durable.
type MakeDurable = fn(&Path) -> std::io::Result<()>;

/// Files that were made for one command. Those that nobody keeps are removed with this value.
#[derive(Debug)]
pub(crate) struct NewFiles {
    paths: Vec<PathBuf>,
    /// Another one in tests.
    make_durable: MakeDurable,
}

impl Default for NewFiles {
    fn default() -> Self {
        NewFiles { paths: Vec::new(), make_durable: make_name_durable }
    }
}

impl NewFiles {
    /// A file at a path that the user named. An empty one may be there already.
    pub(crate) fn given(&mut self, drive_id: &str, path: &Path) -> Result<PathBuf, CommandError> {
        let failed = |why: &dyn std::fmt::Display| {
            CommandError::new(format_args!("drive {drive_id}: the overlay {} {why}", path.display()))
        };
        match self.make(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => match std::fs::metadata(path) {
                Ok(file) if file.is_file() && file.len() == 0 => match (self.make_durable)(path) {
                    Ok(()) => Ok(path.to_owned()),
                    Err(error) => Err(failed(&format_args!("cannot be made durable: {error}"))),
                },
                _ => Err(failed(&"exists already")),
            },
            Err(error) => Err(failed(&format_args!("cannot be made: {error}"))),
        }
    }

    /// A file at the first of `STEM.1`, `STEM.2`, ... that does not exist and is not in `named`.
    pub(crate) fn numbered(
        &mut self,
        drive_id: &str,
        stem: &Path,
        named: &BTreeSet<PathBuf>,
    ) -> Result<PathBuf, CommandError> {
        let failed = |why: &dyn std::fmt::Display| {
            CommandError::new(format_args!(
                "drive {drive_id}: no overlay can be made beside {}: {why}",
                stem.display()
            ))
        };
        for path in (1..MAX_NAMES).map(|number| with_number(stem, number)) {
            if named.contains(&path) {
                continue;
            }
            match self.make(&path) {
                Ok(()) => return Ok(path),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Err(failed(&format_args!("there are {MAX_NAMES} of them")))
    }

    fn make(&mut self, path: &Path) -> std::io::Result<()> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        self.paths.push(path.to_owned());
        (self.make_durable)(path)
    }

    /// Leaves those that are `used`.
    pub(crate) fn keep(mut self, used: impl Fn(&Path) -> bool) {
        self.paths.retain(|path| !used(path));
    }

    /// Leaves those that somebody has begun to use.
    pub(crate) fn keep_begun(self) {
        self.keep(|path| std::fs::metadata(path).is_ok_and(|file| file.len() > 0));
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            // One that is gone is what is wanted.
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
    fn the_name_of_a_new_file_is_durable_before_it_is_given_out() {
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
    fn a_file_whose_name_cannot_be_made_durable_is_refused_and_removed() {
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
    fn two_that_ask_for_a_name_get_two_and_what_is_not_kept_is_removed() {
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
    fn a_path_that_was_given_may_hold_an_empty_file_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let [empty, full, missing] = ["empty", "full", "missing"].map(|name| home.path().join(name));
        std::fs::write(&empty, "").unwrap();
        std::fs::write(&full, "x").unwrap();
        let mut files = NewFiles::default();
        files.given("d", &empty).unwrap();
        assert!(files.given("d", &full).unwrap_err().to_string().contains("full exists already"));
        assert!(files.given("d", Path::new("/nowhere/o")).unwrap_err().to_string().contains("/nowhere/o"));
        assert!(files.given("d", home.path()).is_err());
        let begun = files.given("d", &missing).unwrap();
        std::fs::write(&begun, "x").unwrap();
        files.keep_begun();
        assert_eq!(names(home.path()), ["empty", "full", "missing"], "what was there stays");
    }
}
