//! For unit tests that end a process: the test runs itself again in a subprocess, and checks how
//! that ends.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The environment variable that is set in the subprocess.
const MARK: &str = "VESTA_TEST_SUBPROCESS";

/// How long a subprocess may take. One that hangs fails its test.
const TIMEOUT: Duration = Duration::from_mins(1);

/// How a subprocess ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Whether this process is the subprocess.
pub(crate) fn is_one() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs the test `name` of this program in a subprocess, on its main thread.
pub(crate) fn again(name: &str) -> Ended {
    run(Command::new(this_program()), name)
}

/// As [`again`], with an environment variable.
pub(crate) fn again_with(name: &str, variable: &str, value: impl AsRef<OsStr>) -> Ended {
    let mut command = Command::new(this_program());
    command.env(variable, value);
    run(command, name)
}

/// As [`again`], as process 1 of a PID namespace. A user who is not root needs a user namespace for
/// that.
pub(crate) fn again_as_init(name: &str) -> Ended {
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child"]).arg(this_program());
    run(command, name)
}

fn this_program() -> std::path::PathBuf {
    std::env::current_exe().unwrap()
}

fn run(mut command: Command, name: &str) -> Ended {
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(MARK, "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    std::thread::scope(|scope| {
        let stdout = scope.spawn(move || read(&mut out));
        let stderr = scope.spawn(move || read(&mut err));
        let in_time = wait(&child);
        if !in_time {
            child.kill().unwrap();
        }
        let status = child.wait().unwrap();
        let ended = Ended { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() };
        assert!(in_time, "it hangs: {ended:?}");
        ended
    })
}

fn read(from: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits for the end of the subprocess. False if it takes too long.
fn wait(child: &Child) -> bool {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).unwrap();
    let limit = Timespec::try_from(TIMEOUT).unwrap();
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).unwrap() > 0
}
