//! The emulated host, seen from inside: process 1, and the kernel's `modprobe`.
//!
//! It needs no program of the root file system: it mounts file systems, loads modules and brings
//! the loopback up itself. Errors before the ports exist go to the kernel's log. Then process 1
//! ends and the kernel panics, which the process outside detects.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};
use rustix::process::{Pid, Resource, Rlimit, WaitOptions, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use vesta_tests::modules::{Modules, normal_name};

use super::emulated::{JobEnd, JobSpec, PORT_ERR, PORT_OUT, PORT_STATUS};

/// The kernel's `modprobe`, and the files that it reads.
const MODPROBE: &str = "/run/vesta-host/modprobe";
const MODULES: &str = "/run/vesta-host/modules";
const ALIASES: &str = "/run/vesta-host/aliases";

/// Directories with an empty file system of their own.
const EMPTY: [&str; 4] = ["/dev/shm", "/tmp", "/run", "/srv"];

/// Process 1. Returns only with an error; otherwise it powers the machine off.
pub(crate) fn main(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    if std::process::id() != 1 {
        bail!("host-init is the emulated host's first process; use cargo xtask host");
    }
    let spec = parser.value().context("no job is given")?;
    match run_host(Path::new(&spec)) {
        Ok(()) => unreachable!("the machine was powered off"),
        Err(error) => {
            // Level 0 is shown despite `quiet`.
            let _ = std::fs::write("/dev/kmsg", format!("<0>xtask host-init: {error:#}\n"));
            Err(error)
        }
    }
}

fn run_host(spec: &Path) -> Result<()> {
    let spec = std::fs::read(spec).with_context(|| format!("cannot read {}", spec.display()))?;
    let spec: JobSpec = serde_json::from_slice(&spec).context("the job")?;
    mount_all(&spec.keep)?;
    let mut status = port(PORT_STATUS)?;
    let ending = set_up(&spec)
        .and_then(|()| {
            let _guest = idle_guest()?;
            run_job(&spec)
        })
        .unwrap_or_else(|error| JobEnd::Failed(format!("{error:#}")));
    rustix::fs::sync();
    let mut line = serde_json::to_vec(&ending)?;
    line.push(b'\n');
    status.write_all(&line)?;
    rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?;
    Ok(())
}

/// Mounts the usual file systems. `keep` lists directories that the empty ones must not hide.
fn mount_all(keep: &[PathBuf]) -> Result<()> {
    for (kind, target) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("cgroup2", "/sys/fs/cgroup")]
    {
        mount_one(kind, target)?;
    }
    let hidden = keep.iter().filter(|path| EMPTY.iter().any(|empty| path.starts_with(empty)));
    let kept = hidden
        .map(|path| {
            let tree =
                open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
                    .with_context(|| path.display().to_string())?;
            Ok((path, tree))
        })
        .collect::<Result<Vec<(&PathBuf, OwnedFd)>>>()?;
    std::fs::create_dir_all("/dev/pts")?;
    mount_one("devpts", "/dev/pts")?;
    for target in EMPTY {
        std::fs::create_dir_all(target)?;
        mount_one("tmpfs", target)?;
    }
    for (path, tree) in kept {
        std::fs::create_dir_all(path)?;
        move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .with_context(|| format!("cannot keep {}", path.display()))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        std::os::unix::fs::symlink(target, Path::new("/dev").join(name))?;
    }
    Ok(())
}

fn mount_one(kind: &str, target: &str) -> Result<()> {
    let data = (kind == "devpts").then(|| CString::new("ptmxmode=666").expect("it has no NUL"));
    mount("none", target, kind, MountFlags::empty(), data.as_deref())
        .with_context(|| format!("cannot mount {kind} on {target}"))
}

/// Opens the virtio-serial port of that name, once the machine has it.
fn port(name: &str) -> Result<File> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        for entry in std::fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let label = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if label.trim_end() == name {
                let node = Path::new("/dev").join(entry.file_name());
                return File::options()
                    .read(true)
                    .write(true)
                    .open(&node)
                    .with_context(|| node.display().to_string());
            }
        }
        if Instant::now() > deadline {
            bail!("the machine has no virtio-serial port {name}");
        }
        // The device announces its ports; only their directory entries can be polled.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn set_up(spec: &JobSpec) -> Result<()> {
    std::fs::create_dir_all("/run/vesta-host")?;
    std::os::unix::fs::symlink(&spec.program, MODPROBE)?;
    std::os::unix::fs::symlink(&spec.modules_dir, MODULES)?;
    std::os::unix::fs::symlink(&spec.aliases, ALIASES)?;
    std::fs::write("/proc/sys/kernel/modprobe", MODPROBE)?;
    make_nodes(&std::fs::read_to_string(ALIASES).context(ALIASES)?)?;
    let names: Vec<&str> =
        std::iter::once("kvm_amd").chain(spec.modules.iter().map(String::as_str)).collect();
    load(&Modules::new(MODULES), &names)?;
    rustix::system::sethostname(b"emulated-host")?;
    // The kernel gives the loopback its address when it comes up.
    std::fs::write("/sys/class/net/lo/flags", "0x9").context("cannot bring the loopback up")?;
    setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None })?;
    setrlimit(Resource::Nofile, Rlimit { current: Some(1024), maximum: Some(1 << 20) })?;
    Ok(())
}

/// Makes the device nodes of modules that the kernel loads when their node is opened.
fn make_nodes(aliases: &str) -> Result<()> {
    let aliases = || aliases.lines().filter_map(|line| line.split_once(' '));
    for (alias, module) in aliases() {
        let Some(name) = alias.strip_prefix("devname:") else { continue };
        let numbers = aliases().filter(|(_, other)| *other == module).find_map(|(alias, _)| {
            let (major, minor) = alias.strip_prefix("char_major_")?.split_once('_')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        let Some((major, minor)) = numbers else { continue };
        let node = Path::new("/dev").join(name);
        if let Some(parent) = node.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let device = rustix::fs::makedev(major, minor);
        match rustix::fs::mknodat(CWD, &node, FileType::CharacterDevice, Mode::from_raw_mode(0o600), device) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", node.display())),
        }
    }
    Ok(())
}

/// Creates a guest that never runs. KVM patches the scheduler's code for the first guest and after
/// the last one, and emulated processors sometimes crash in code that changes (an `int3` in
/// `__schedule`). While this guest exists, no other one is the first or the last.
fn idle_guest() -> Result<kvm_ioctls::VmFd> {
    let kvm = kvm_ioctls::Kvm::new().context("cannot open /dev/kvm")?;
    kvm.create_vm().context("cannot create a guest")
}

/// Loads modules and their dependencies, unless they are loaded.
fn load(modules: &Modules, names: &[&str]) -> Result<()> {
    for name in modules.load_order(names)? {
        if Path::new("/sys/module").join(&name).exists() {
            continue;
        }
        let file = File::open(modules.file(&name))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot load the kernel module {name}")),
        }
    }
    Ok(())
}

/// Whether this program was started as the kernel's `modprobe`.
pub(crate) fn is_modprobe(name: &OsStr) -> bool {
    name == MODPROBE
}

/// `modprobe -q -- NAME`, as the kernel calls it. NAME is a module or an alias of one.
pub(crate) fn modprobe(args: impl Iterator<Item = OsString>) -> Result<ExitCode> {
    let name = args.last().context("no module is named")?;
    let name = normal_name(name.to_str().context("the module's name is not UTF-8")?);
    let aliases = std::fs::read_to_string(ALIASES)?;
    let module = aliases
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(alias, module)| (alias == name).then_some(module))
        .unwrap_or(&name);
    let modules = Modules::new(MODULES);
    if !modules.file(module).exists() {
        // The kernel asks for many optional modules.
        return Ok(ExitCode::FAILURE);
    }
    load(&modules, &[module])?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the job until it has ended and all its output is forwarded.
fn run_job(spec: &JobSpec) -> Result<JobEnd> {
    let (program, args) = spec.argv.split_first().context("no command is given")?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(spec.env.iter().cloned()).current_dir(&spec.cwd).stdin(Stdio::null());
    let (over, ended) = std::io::pipe()?;
    let mut pumps = Vec::new();
    let (reader, writer) = std::io::pipe()?;
    if spec.merge {
        command.stderr(writer.try_clone()?);
    } else {
        let (reader, writer) = std::io::pipe()?;
        command.stderr(writer);
        pumps.push(pump(reader, port(PORT_ERR)?, over.try_clone()?));
    }
    command.stdout(writer);
    pumps.push(pump(reader, port(PORT_OUT)?, over.try_clone()?));

    let pid = spawn_pinned(command, spec.pin)
        .with_context(|| format!("cannot run {}", program.to_string_lossy()))?;
    let ending = reap_until(pid)?;
    drop(ended);
    for pump in pumps {
        // It fails only where the machine outside no longer reads.
        let _ = pump.join();
    }
    Ok(ending)
}

/// Starts the command on one processor, or on all. Only the thread that starts it is pinned, and
/// the command inherits that; the threads that forward output are not pinned.
fn spawn_pinned(mut command: Command, pin: Option<usize>) -> Result<Pid> {
    let spawn = move || -> Result<Pid> {
        if let Some(cpu) = pin {
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(None, &set).with_context(|| format!("cannot pin to processor {cpu}"))?;
        }
        Ok(Pid::from_child(&command.spawn()?))
    };
    std::thread::spawn(spawn).join().expect("it does not panic")
}

/// Reaps children and orphans until process `pid` ends.
fn reap_until(pid: Pid) -> Result<JobEnd> {
    loop {
        let Some((ended, status)) = rustix::process::wait(WaitOptions::empty())? else { continue };
        if ended != pid {
            continue;
        }
        if let Some(code) = status.exit_status() {
            return Ok(JobEnd::Exited(u8::try_from(code).unwrap_or(u8::MAX)));
        }
        if let Some(signal) = status.terminating_signal() {
            return Ok(JobEnd::Signaled(signal));
        }
    }
}

/// Forwards what `from` receives until its writers are closed. When the other end of `over` is
/// closed, the command has ended; then it forwards only until `from` is empty, because processes
/// that the command left behind may keep the pipe open.
fn pump(mut from: PipeReader, mut to: File, over: PipeReader) -> JoinHandle<Result<()>> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let mut watched = [PollFd::new(&from, PollFlags::IN), PollFd::new(&over, PollFlags::IN)];
            poll(&mut watched, None)?;
            let [from_is, over_is] = watched.map(|fd| fd.revents());
            if from_is.contains(PollFlags::IN) {
                let len = from.read(&mut buffer)?;
                to.write_all(&buffer[..len])?;
            } else if !from_is.is_empty() || !over_is.is_empty() {
                return Ok(());
            }
        }
    })
}
