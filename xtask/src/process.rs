//! Child processes and temporary directories, none of which outlive this process.
//!
//! Children are killed when this process ends ([`die_with_us`]). Directories made with
//! [`ScratchDir`] are removed on return, on error and on a signal ([`clean_up_on_signals`]).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use vesta_tests::process::die_with_parent;

/// Prints on standard error what is being done.
macro_rules! say {
    ($($arg:tt)*) => { eprintln!("xtask: {}", format_args!($($arg)*)) };
}
pub(crate) use say;

/// The path of this program.
///
/// A build of the whole workspace gives other features to the crates that this program has in
/// common with it, so that cargo replaces the file while it runs. The new one does the same.
pub(crate) fn this_program() -> Result<PathBuf> {
    let path = std::env::current_exe().context("this program's own path")?;
    let text = path.as_os_str().as_bytes();
    let replaced = text.strip_suffix(b" (deleted)").map(|path| PathBuf::from(OsStr::from_bytes(path)));
    Ok(replaced.filter(|path| path.exists()).unwrap_or(path))
}

/// Runs a command to its end; an error names the command and how it ended.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status =
        die_with_parent(command).status().with_context(|| format!("cannot run {}", describe(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", describe(command));
    }
    Ok(())
}

/// Runs a command to its end and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        die_with_parent(command).output().with_context(|| format!("cannot run {}", describe(command)))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}\n{}", describe(command), output.status, errors.trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{}: output is not UTF-8", describe(command)))
}

fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Has the command's process killed when this one ends for any reason, and gives it a process group
/// of its own, so that the terminal's Ctrl-C does not reach it.
///
/// Call it from the main thread only: see [`die_with_parent`].
pub(crate) fn die_with_us(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    die_with_parent(command.process_group(0))
}

/// Directories to remove before this process ends.
static SCRATCH: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A temporary directory that is removed with its contents.
pub(crate) struct ScratchDir(PathBuf);

impl ScratchDir {
    /// Makes a new directory in the system's directory for temporary files. Removes directories
    /// that a killed process left there.
    pub(crate) fn new() -> Result<ScratchDir> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let parent = std::env::temp_dir();
        // A process id is only valid on one machine and since one boot, and the emulated host may
        // share the parent directory.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let prefix = format!("vesta-xtask-{}-", boot.get(..8).unwrap_or_default());
        for left in std::fs::read_dir(&parent).with_context(|| parent.display().to_string())?.flatten() {
            let name = left.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.strip_prefix(&prefix)?.split('-').next()?.parse::<u32>().ok());
            if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                // Another process may be removing it too.
                let _ = std::fs::remove_dir_all(left.path());
            }
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{prefix}{}-{count}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        SCRATCH.lock().expect("no thread panics with it").push(path.clone());
        Ok(ScratchDir(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
        SCRATCH.lock().expect("no thread panics with it").retain(|path| *path != self.0);
    }
}

/// Makes SIGINT, SIGTERM and SIGHUP remove every [`ScratchDir`] and end this process, and with it
/// its children, with status 128 plus the signal's number.
pub(crate) fn clean_up_on_signals() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let scratch = SCRATCH.lock().expect("no thread panics with it");
            for path in &*scratch {
                let _ = std::fs::remove_dir_all(path);
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// The cargo that runs us, in the repository.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The cache for downloads and builds: `$XDG_CACHE_HOME/vesta`, else `~/.cache/vesta`.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    let dir = base.join("vesta");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// The directory `KIND/NAME` of the cache, made by `make` if it is missing. One process makes it,
/// under a temporary name; other processes wait.
pub(crate) fn once_in(kind: &str, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let parent = cache_dir()?.join(kind);
    let dir = parent.join(name);
    if dir.is_dir() {
        return Ok(dir);
    }
    std::fs::create_dir_all(&parent)?;
    let lock = std::fs::File::create(parent.join(".lock"))?;
    lock.lock()?;
    if !dir.is_dir() {
        let part = parent.join(format!("{name}.part"));
        if part.exists() {
            std::fs::remove_dir_all(&part)?;
        }
        std::fs::create_dir(&part)?;
        make(&part).with_context(|| format!("cannot get {name}"))?;
        std::fs::rename(&part, &dir)?;
        say!("{name} is ready in {}", dir.display());
    }
    Ok(dir)
}

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the repository")
}
