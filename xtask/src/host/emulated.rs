//! The emulated host, seen from this machine.
//!
//! It is QEMU's software CPU with AMD-V and Debian's kernel with `kvm-amd`. Its root file system is
//! this machine's, through virtio-fs, and its init is this same binary ([`super::init`]). Three
//! virtio-serial ports carry the command's standard output, its standard error, and one line of
//! JSON that says how it ended. Without that line the machine has died.
//!
//! Paths are the same inside, and files written there are on this machine's disk, except under
//! `/tmp`, `/run`, `/srv` and `/dev/shm`, which are empty there. Directories that the job needs
//! below those are bind-mounted.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::job::{Job, Outcome};
use crate::apt;
use crate::kernels::{self, Kernel};
use crate::process::{ScratchDir, cache_dir, die_with_us, root};

/// The C virtiofsd of Debian 12 (`qemu-system-common`).
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// How many lines of a dead machine's log are shown.
const LOG_LINES_SHOWN: usize = 25;
/// The tag of the root file system.
pub(super) const ROOT_TAG: &str = "root";

/// The virtio-serial ports, by name.
pub(super) const PORT_OUT: &str = "vesta.out";
pub(super) const PORT_ERR: &str = "vesta.err";
pub(super) const PORT_STATUS: &str = "vesta.status";

/// The configuration of an emulated host.
#[derive(Debug, Clone)]
pub(crate) struct Emulated {
    /// The number of its processors.
    pub(crate) cpus: u8,
    /// Its memory.
    pub(crate) mem_mib: u32,
    /// The time limit of the job, including the machine's boot.
    pub(crate) timeout: Duration,
    /// The processor that the job is pinned to. Without it, the machine's kernel dies within
    /// seconds when guests run on two emulated processors at once; one guest at a time mostly
    /// works.
    pub(crate) pin: Option<usize>,
    /// Kernel modules to load at boot, in addition to `kvm-amd`. Others are loaded on demand.
    pub(crate) modules: Vec<String>,
    /// The file to copy its kernel's log to, however the job ends.
    pub(crate) kernel_log: Option<PathBuf>,
    /// How to detect that the machine hangs.
    pub(crate) watch: Option<Watch>,
}

/// A file that grows while the job makes progress.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    pub(crate) file: PathBuf,
    /// The longest time without growth.
    pub(crate) quiet: Duration,
}

impl Default for Emulated {
    fn default() -> Self {
        Emulated {
            cpus: 2,
            mem_mib: 4096,
            timeout: Duration::from_mins(10),
            pin: Some(1),
            modules: Vec::new(),
            kernel_log: None,
            watch: None,
        }
    }
}

/// The job, as the machine's init receives it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct JobSpec {
    pub(super) argv: Vec<OsString>,
    pub(super) env: Vec<(OsString, OsString)>,
    pub(super) cwd: OsString,
    pub(super) pin: Option<usize>,
    /// Whether standard output and standard error are one file, so their order must be kept.
    pub(super) merge: bool,
    pub(super) modules_dir: PathBuf,
    pub(super) aliases: PathBuf,
    pub(super) modules: Vec<String>,
    /// Directories that must not be hidden by the empty file systems.
    pub(super) keep: Vec<PathBuf>,
    /// This program.
    pub(super) program: PathBuf,
}

/// How the job ended, as the machine's init reports it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum JobEnd {
    Exited(u8),
    Signaled(i32),
    /// The job could not be started.
    Failed(String),
}

impl Emulated {
    /// Installs what is missing, starts the machine, runs the job, and stops the machine.
    pub(crate) fn run(&self, job: &Job) -> Result<Outcome> {
        if !rustix::process::geteuid().is_root() {
            bail!("the emulated host shares this machine's root file system with QEMU; run this as root");
        }
        apt::ensure(&[
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("../lib/qemu/virtiofsd", "qemu-system-common"),
        ])?;
        let kernel = kernels::debian(kernels::DEBIAN_6_12)?;
        let scratch = ScratchDir::new()?;
        let mut machine = self.start(job, &kernel, &scratch)?;
        let ending = machine.wait(self);
        machine.stop();
        let log = scratch.path().join("console");
        if let Some(keep) = &self.kernel_log {
            std::fs::copy(&log, keep).with_context(|| format!("cannot write {}", keep.display()))?;
        }
        match ending {
            Ok(JobEnd::Exited(status)) => Ok(Outcome::Exited(status)),
            Ok(JobEnd::Signaled(signal)) => Ok(Outcome::Signaled(signal)),
            Ok(JobEnd::Failed(reason)) => bail!("on the emulated host: {reason}"),
            Err(Failure::TimedOut) => Ok(Outcome::TimedOut),
            Err(Failure::Died) => died(&scratch, "it died"),
            Err(Failure::Hung) => died(&scratch, "it hung"),
        }
    }

    fn start(&self, job: &Job, kernel: &Kernel, scratch: &ScratchDir) -> Result<Machine> {
        let program = crate::process::this_program()?;
        let init = program.to_str().filter(|path| !path.contains([' ', '"'])).with_context(|| {
            format!("{}: this path cannot be on a kernel command line", program.display())
        })?;
        let spec_file = scratch.path().join("spec");
        self.write_spec(job, kernel, &program, &spec_file)?;

        let socket = scratch.path().join("fs.sock");
        // Listening before either side starts, so neither has to wait for the other.
        let listener = UnixListener::bind(&socket)?;
        let mut files = Command::new(VIRTIOFSD);
        files.arg(format!("--fd={}", inherit(&listener)?));
        files.args(["-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot", "-o", "xattr"]);
        files.arg("--thread-pool-size=2");
        let log = std::fs::File::create(scratch.path().join("virtiofsd"))?;
        files.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let files = die_with_us(&mut files).spawn().with_context(|| format!("cannot run {VIRTIOFSD}"))?;
        drop(listener);

        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args(["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "EPYC"]);
        qemu.arg("-smp").arg(self.cpus.to_string());
        qemu.arg("-m").arg(self.mem_mib.to_string());
        // virtiofsd maps the machine's memory.
        qemu.arg("-object").arg(format!("memory-backend-memfd,id=ram,size={}M,share=on", self.mem_mib));
        qemu.args(["-numa", "node,memdev=ram"]);
        qemu.arg("-chardev").arg(format!("socket,id=fs,path={}", path_option(&socket)?));
        qemu.args(["-device", &format!("vhost-user-fs-pci,chardev=fs,tag={ROOT_TAG}")]);
        qemu.arg("-serial").arg(format!("file:{}", path_option(&scratch.path().join("console"))?));
        qemu.args(["-device", "virtio-serial-pci"]);
        let mut ports = Vec::new();
        let mut theirs = Vec::new();
        for name in [PORT_OUT, PORT_ERR, PORT_STATUS] {
            let (ours, other) = UnixStream::pair()?;
            qemu.arg("-chardev").arg(format!("socket,id={name},fd={}", inherit(&other)?));
            qemu.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
            ports.push(ours);
            theirs.push(other);
        }
        qemu.arg("-kernel").arg(&kernel.image);
        qemu.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 oops=panic mitigations=off rootfstype=virtiofs root={ROOT_TAG} rw \
             init={init} -- host-init {}",
            spec_file.display()
        ));
        let log = std::fs::File::create(scratch.path().join("qemu"))?;
        qemu.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let qemu = die_with_us(&mut qemu).spawn().context("cannot run qemu-system-x86_64")?;
        drop(theirs);

        let mut ports = ports.into_iter();
        let mut port = || ports.next().expect("one was made for each name");
        let out = pump(port(), std::io::stdout());
        let err = pump(port(), std::io::stderr());
        let (said, results) = channel();
        let mut status = port();
        std::thread::spawn(move || {
            let mut line = String::new();
            // A machine that died has sent no line or a part of one; `wait` detects both.
            let _ = status.read_to_string_until_newline(&mut line);
            let _ = said.send(line);
        });
        Ok(Machine { children: vec![qemu, files], output: vec![out, err], results })
    }

    fn write_spec(&self, job: &Job, kernel: &Kernel, program: &Path, file: &Path) -> Result<()> {
        let modules = kernel.modules.as_ref().context("the emulated host's kernel has no modules")?;
        let stat =
            |fd: std::os::fd::BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
        let spec = JobSpec {
            argv: job.argv.clone(),
            env: job.env.clone(),
            cwd: job.cwd.clone().into(),
            pin: self.pin,
            merge: stat(std::io::stdout().as_fd())? == stat(std::io::stderr().as_fd())?,
            modules_dir: modules.dir().to_owned(),
            aliases: modules.dir().with_file_name("aliases"),
            modules: self.modules.clone(),
            keep: vec![
                job.cwd.clone(),
                root().to_owned(),
                program.parent().unwrap_or(Path::new("/")).to_owned(),
                cache_dir()?,
            ],
            program: program.to_owned(),
        };
        std::fs::write(file, serde_json::to_vec(&spec)?)?;
        Ok(())
    }
}

/// Reading one line from a socket.
trait ReadLine {
    fn read_to_string_until_newline(&mut self, line: &mut String) -> std::io::Result<()>;
}

impl ReadLine for UnixStream {
    fn read_to_string_until_newline(&mut self, line: &mut String) -> std::io::Result<()> {
        std::io::BufRead::read_line(&mut std::io::BufReader::new(self), line).map(drop)
    }
}

/// A running emulated host.
struct Machine {
    children: Vec<Child>,
    output: Vec<JoinHandle<()>>,
    results: Receiver<String>,
}

enum Failure {
    TimedOut,
    Died,
    Hung,
}

impl Machine {
    fn wait(&mut self, limits: &Emulated) -> Result<JobEnd, Failure> {
        let started = Instant::now();
        let size = || {
            limits.watch.as_ref().and_then(|watch| std::fs::metadata(&watch.file).ok()).map(|file| file.len())
        };
        let mut last = (size(), Instant::now());
        loop {
            match self.results.recv_timeout(Duration::from_secs(1)) {
                Ok(line) => return serde_json::from_str(&line).map_err(|_| Failure::Died),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Died),
                Err(RecvTimeoutError::Timeout) if started.elapsed() > limits.timeout => {
                    return Err(Failure::TimedOut);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if size() != last.0 {
                last = (size(), Instant::now());
            }
            if limits.watch.as_ref().is_some_and(|watch| last.1.elapsed() > watch.quiet) {
                return Err(Failure::Hung);
            }
        }
    }

    /// Kills the machine, and forwards its remaining output.
    fn stop(&mut self) {
        for child in &mut self.children {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
        for pump in self.output.drain(..) {
            let _ = pump.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Saves the logs of a dead machine to the cache, and returns their relevant lines.
fn died(scratch: &ScratchDir, how: &str) -> Result<Outcome> {
    let mut all = format!("{how}\n");
    for name in ["virtiofsd", "qemu", "console"] {
        let text = std::fs::read(scratch.path().join(name)).unwrap_or_default();
        all.extend([&format!("== {name}\n"), String::from_utf8_lossy(&text).as_ref(), "\n"]);
    }
    let logs = cache_dir()?.join("logs");
    std::fs::create_dir_all(&logs)?;
    let name = scratch.path().file_name().context("it has a name")?.to_string_lossy();
    let log = logs.join(format!("host-{name}.log"));
    std::fs::write(&log, &all)?;
    // The first error is more useful than the end of its trace.
    let lines: Vec<&str> = all.lines().map(str::trim_end).collect();
    let trouble = ["Kernel panic", "BUG:", "Oops", "host-init:", "soft lockup", "rcu: INFO"];
    let found = lines.iter().position(|line| trouble.iter().any(|word| line.contains(word)));
    let start = found.unwrap_or(lines.len().saturating_sub(LOG_LINES_SHOWN));
    let end = lines.len().min(start + LOG_LINES_SHOWN);
    let tail = lines[start..end].join("\n");
    Ok(Outcome::HostDied { log, tail })
}

/// Forwards what a port receives. Two threads: an emulated processor spins until its output is
/// read, so a slow reader of our output must not block it.
fn pump(mut from: UnixStream, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    let (chunks, taken) = channel::<Vec<u8>>();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if chunks.send(buffer[..len].to_vec()).is_err() {
                break;
            }
        }
    });
    std::thread::spawn(move || {
        // The job continues when nothing reads our output.
        for chunk in taken {
            let _ = to.write_all(&chunk).and_then(|()| to.flush());
        }
    })
}

/// Makes the next child inherit this descriptor; returns its number.
fn inherit(fd: &(impl AsFd + AsRawFd)) -> Result<i32> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    Ok(fd.as_raw_fd())
}

/// A path as part of a QEMU option, in which commas are doubled.
fn path_option(path: &Path) -> Result<String> {
    Ok(path.to_str().context("the directory for temporary files is not UTF-8")?.replace(',', ",,"))
}
