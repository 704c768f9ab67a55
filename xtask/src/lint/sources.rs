//! The files to check: those that git tracks, and new ones that it does not ignore.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Files of a repository.
pub(crate) struct Sources {
    root: PathBuf,
    files: Vec<PathBuf>,
}

impl Sources {
    /// Lists the files below `paths`, which are relative to `directory`, or all of the repository
    /// where there are none.
    pub(crate) fn find(directory: &Path, paths: &[PathBuf]) -> Result<Sources> {
        let root = git(directory, &["rev-parse", "--show-toplevel"], &[])?;
        let root = PathBuf::from(std::ffi::OsString::from_vec(root.trim_ascii_end().to_vec()));
        let list = ["ls-files", "-z", "--full-name", "--cached", "--others", "--exclude-standard"];
        let listing = match paths {
            [] => git(&root, &list, &[])?,
            _ => git(directory, &list, paths)?,
        };
        let mut files: Vec<PathBuf> = listing
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| PathBuf::from(std::ffi::OsString::from_vec(name.to_vec())))
            // A deleted file stays in the index until the deletion is staged.
            .filter(|name| root.join(name).is_file())
            .collect();
        files.sort();
        files.dedup();
        if files.is_empty() {
            bail!("git lists no files in {}", directory.display());
        }
        Ok(Sources { root, files })
    }

    /// The root of the repository.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The files, relative to the root and sorted.
    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The Rust files among them, with their text.
    pub(crate) fn rust(&self) -> impl Iterator<Item = Result<(&Path, String)>> {
        let files = self.files.iter().filter(|file| file.extension().is_some_and(|name| name == "rs"));
        files.map(|file| Ok((file.as_path(), self.read(file)?)))
    }

    /// Reads a text file.
    pub(crate) fn read(&self, file: &Path) -> Result<String> {
        std::fs::read_to_string(self.root.join(file)).with_context(|| file.display().to_string())
    }
}

fn git(directory: &Path, args: &[&str], paths: &[PathBuf]) -> Result<Vec<u8>> {
    let mut command = Command::new("git");
    command.arg("-C").arg(directory).args(args);
    if !paths.is_empty() {
        command.arg("--").args(paths);
    }
    let output = command.output().context("cannot run git")?;
    if !output.status.success() {
        bail!("git {} failed: {}", args[0], String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(output.stdout)
}
