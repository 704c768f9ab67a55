//! Tests of tasks with a real API socket. The test's thread is the main thread, and its clients are
//! threads.

use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use config::Logger;
use machine::legacy::SerialSetup;
use serde_json::Value;

use super::*;
use crate::api::{ApiServer, Limits};
use crate::child::ForkPlan;
use crate::events::EventLog;
use crate::microvm::MicroVm;
use crate::{Identity, Instance, Platform};

/// A process without a guest.
#[derive(Debug)]
struct FakeHost {
    stop: OwnedFd,
}

impl Host for FakeHost {
    fn set_up_logger(&mut self, _: &Logger) -> std::io::Result<()> {
        Ok(())
    }

    fn standard_io(&mut self) -> std::io::Result<SerialSetup> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn fork(&mut self, _: ForkPlan) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn fork_writer(&mut self, _: Vec<RawFd>, _: Box<dyn FnOnce() -> bool>) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn asked_to_end(&self) -> Option<BorrowedFd<'_>> {
        Some(self.stop.as_fd())
    }

    fn guest_starts(&mut self, _: bool) {}
}

struct Monitor {
    vm: MicroVm,
    tasks: Tasks<FakeHost>,
    /// A write to it is a signal that asks the process to end.
    stop: OwnedFd,
    dir: tempfile::TempDir,
}

impl Monitor {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let api = ApiServer::bind(&dir.path().join("api"), Limits::default()).unwrap();
        let stop = OwnedFd::from(EventFd::new().unwrap());
        let host = FakeHost { stop: stop.try_clone().unwrap() };
        let identity = Identity { id: "vm".into(), app_name: "test", version: "0", api_version: "0" };
        let instance = Arc::new(Instance::new(identity));
        let platform = Platform { boot_timer: None, pci: false, mmds_size_limit: 1024, max_payload: 1024 };
        let (sink, _source) = machine::event_channel().unwrap();
        let events = EventLog::new("vm");
        let mut tasks = Tasks::new(host);
        tasks.requests = Some(api.spawn(Arc::clone(&instance), events.clone()).unwrap());
        Monitor { vm: MicroVm::new(instance, platform, sink, events), tasks, stop, dir }
    }

    fn run<T: Send + 'static>(
        &mut self,
        paths: Option<&SnapshotPaths>,
        work: impl FnOnce(&Token) -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        self.tasks.run(&self.vm, paths, work)
    }

    fn client(&self) -> UnixStream {
        connect(self.dir.path())
    }
}

fn connect(dir: &Path) -> UnixStream {
    let client = UnixStream::connect(dir.join("api")).unwrap();
    client.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
    client
}

fn send(client: &mut UnixStream, request: &str, body: &str) {
    let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    write!(client, "{request} HTTP/1.1\r\n{length}\r\n{body}").unwrap();
}

/// The status and the body.
fn answer(client: &mut UnixStream) -> (String, Value) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    client.read_exact(&mut body).unwrap();
    let status = head.split(' ').nth(1).unwrap().to_owned();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

fn ask(client: &mut UnixStream, request: &str) -> (String, Value) {
    send(client, request, "");
    answer(client)
}

fn paths() -> SnapshotPaths {
    SnapshotPaths { snapshot_path: "s".into(), mem_file_path: "m".into() }
}

/// Stands for a system call that returns once the other end sends, or is dropped.
fn stuck() -> (Sender<()>, Receiver<()>) {
    channel()
}

#[test]
fn questions_are_answered_while_a_task_is_stuck() {
    let mut monitor = Monitor::new();
    let (release, is_released) = stuck();
    let mut client = monitor.client();
    let questions = std::thread::spawn(move || {
        let instance = ask(&mut client, "GET /");
        let config = ask(&mut client, "GET /machine-config");
        let version = ask(&mut client, "GET /version");
        let whole = ask(&mut client, "GET /vm/config");
        let metadata = ask(&mut client, "GET /mmds");
        release.send(()).unwrap();
        [instance, config, version, whole, metadata]
    });
    let done = monitor.run(None, move |_| is_released.recv().is_ok()).unwrap();
    assert!(done, "the client released it after all its answers");
    let answers = questions.join().unwrap();
    assert!(answers.iter().all(|(status, _)| status == "200"), "{answers:?}");
    assert_eq!(answers[0].1["state"], "Not started");
}

#[test]
fn other_commands_wait_for_a_task_in_order() {
    let mut monitor = Monitor::new();
    let (release, is_released) = stuck();
    let mut clients: Vec<_> = (0..3).map(|_| monitor.client()).collect();
    let dir = monitor.dir.path().to_owned();
    let asking = std::thread::spawn(move || {
        for (vcpus, client) in (1..).zip(&mut clients) {
            send(client, "PUT /machine-config", &format!(r#"{{"vcpu_count":{vcpus},"mem_size_mib":8}}"#));
            // Answered after the command above has arrived at the main thread.
            let (_, config) = ask(&mut connect(&dir), "GET /machine-config");
            assert_eq!(config["mem_size_mib"], 128, "no command runs meanwhile");
        }
        release.send(()).unwrap();
        clients
    });
    monitor.run(None, move |_| is_released.recv()).unwrap().unwrap();
    let clients = asking.join().unwrap();
    let requests = monitor.tasks.requests.as_ref().unwrap();
    let taken = std::iter::from_fn(|| requests.try_recv());
    let vcpus: Vec<_> = taken
        .map(|request| match request.command {
            Command::PutMachineConfig(config) => config.vcpu_count,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(vcpus, [1, 2, 3]);
    drop(clients);
}

#[test]
fn signal_cancels_a_task() {
    let mut monitor = Monitor::new();
    rustix::io::write(&monitor.stop, &1_u64.to_ne_bytes()).unwrap();
    let result = monitor.run(None, |token| {
        let mut fds = [PollFd::new(token, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        token.check()
    });
    assert_eq!(result.unwrap_err().to_string(), "the command was cancelled");
}

#[test]
fn cancelled_task_is_an_error_although_its_work_succeeds() {
    let mut monitor = Monitor::new();
    rustix::io::write(&monitor.stop, &1_u64.to_ne_bytes()).unwrap();
    let wait_and_succeed = |token: &Token| {
        let mut fds = [PollFd::new(token, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
    };
    let result = monitor.run(None, wait_and_succeed);
    assert!(matches!(result, Err(TaskError::Cancelled)), "{result:?}");
    monitor.tasks.run_committing(&monitor.vm, None, wait_and_succeed).unwrap();
}

#[test]
fn stuck_task_is_left_behind_at_a_signal() {
    let mut monitor = Monitor::new();
    rustix::io::write(&monitor.stop, &1_u64.to_ne_bytes()).unwrap();
    let (release, is_released) = stuck();
    let result = monitor.run(None, move |_| is_released.recv());
    assert!(matches!(result, Err(TaskError::Abandoned)), "{result:?}");
    drop(release);
}

#[test]
fn task_with_paths_shows_progress_and_can_be_cancelled() {
    let mut monitor = Monitor::new();
    let mut client = monitor.client();
    let asking = std::thread::spawn(move || {
        // The first question may come before the first step.
        let progress = loop {
            let (_, job) = ask(&mut client, "GET /snapshot/job");
            if job["bytes_done"] != 0 {
                break job;
            }
        };
        (progress, ask(&mut client, "DELETE /snapshot/job").0)
    });
    let cancelled = monitor.run(Some(&paths()), |token| {
        token.progress(1 << 20, 1 << 30);
        let mut fds = [PollFd::new(token, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        token.check()
    });
    assert!(matches!(cancelled, Err(TaskError::Cancelled)), "{cancelled:?}");
    let (progress, status) = asking.join().unwrap();
    assert_eq!(progress["state"], "Running");
    assert_eq!((&progress["bytes_done"], &progress["snapshot_path"]), (&json!(1 << 20), &json!("s")));
    assert_eq!(status, "204");
}

#[test]
#[should_panic(expected = "a bug")]
fn panic_of_a_task_is_one_of_the_main_thread() {
    let _ = Monitor::new().run(None, |_| panic!("a bug"));
}

#[test]
fn metrics_are_written_while_a_task_waits() {
    struct Ticking(Sender<()>);
    impl Questions for Ticking {
        fn tick(&self) -> Option<Duration> {
            // The task has ended after the last tick that it waited for.
            let _ = self.0.send(());
            Some(Duration::from_millis(1))
        }

        fn answer(&self, _: &Command) -> Option<Result<Reply, CommandError>> {
            None
        }
    }
    let (sender, ticks) = channel();
    let mut monitor = Monitor::new();
    let ticked = monitor.tasks.run(&Ticking(sender), None, move |_| ticks.iter().take(3).count());
    assert_eq!(ticked.unwrap(), 3);
}
