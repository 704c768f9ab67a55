//! The log as a whole. It is global, so each test runs in a process of its own.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};

use config::{LogLevel, Logger};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::*;
use crate::subprocess::{again, again_with, is_one};

/// Where the log goes in the subprocess.
const PATH: &str = "LOG";

/// Logs to the file that the test's parent chose.
fn log_to_file() -> PathBuf {
    let path = PathBuf::from(std::env::var_os(PATH).unwrap());
    install("vm");
    set_up(&Logger { log_path: Some(path.clone()), ..Logger::default() }).unwrap();
    path
}

fn assert_good(ended: &crate::subprocess::Ended) {
    assert!(ended.status.success(), "{ended:?}");
}

fn flood(count: usize) {
    for number in 0..count {
        log::warn!("flood {number}");
    }
}

#[test]
fn flood_from_one_place_is_ten_lines_and_their_count() {
    if is_one() {
        install("vm");
        flood(1000);
        log::warn!("another place");
        for number in 0..20 {
            log::info!(target: "firecracker::api_server", "request {number}");
        }
        finish();
        assert_eq!(missed(), Missed { lost: 0, suppressed: 990 });
        return;
    }
    let ended = again("logger::tests::flood_from_one_place_is_ten_lines_and_their_count");
    assert_good(&ended);
    let count = |text: &str| ended.stdout.lines().filter(|line| line.contains(text)).count();
    assert_eq!((count("] flood "), count("] another place"), count("] request ")), (10, 1, 20), "{ended:?}");
    assert_eq!(count("] more lines like the last one from this place are suppressed"), 1, "{ended:?}");
    assert_eq!(count("] 990 lines from crates/vmm/src/logger/tests.rs:"), 1, "{ended:?}");
}

#[test]
fn level_and_module_filter_every_line() {
    if is_one() {
        install("vm");
        let module = Some("vesta_vmm::logger".to_owned());
        set_up(&Logger { level: Some(LogLevel::Warning), module, ..Logger::default() }).unwrap();
        log::info!("level too low");
        log::warn!("passes by its module");
        log::warn!(target: "vesta_vmm::logger::x", "passes by its target");
        log::warn!(target: "firecracker", "passes by its module too");
        crate::personality::Personality::Firecracker.log_exit(1);
        return;
    }
    let ended = again("logger::tests::level_and_module_filter_every_line");
    assert_good(&ended);
    let lines = ended.stdout.lines().filter(|line| line.contains("[vm:")).count();
    assert_eq!((lines, ended.stdout.matches("passes").count()), (3, 3), "{ended:?}");
}

/// Reads what is in the FIFO now.
fn drain(fifo: &mut File) -> String {
    let mut text = Vec::new();
    let mut part = vec![0; 65536];
    while let Ok(len @ 1..) = fifo.read(&mut part) {
        text.extend_from_slice(&part[..len]);
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn fifo_without_reader_loses_lines_and_their_number_follows() {
    use std::os::unix::fs::OpenOptionsExt;
    if is_one() {
        let path = log_to_file();
        for _ in 0..3000 {
            log::info!(target: "firecracker", "{}", "x".repeat(100));
        }
        let lost = missed().lost;
        assert!((1..3000).contains(&lost), "{lost}");
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let mut reader = OpenOptions::new().read(true).custom_flags(nonblocking).open(path).unwrap();
        let before = drain(&mut reader);
        assert_eq!(before.lines().count() as u64, 3000 - lost);
        assert!(before.lines().all(|line| line.ends_with(&"x".repeat(100))), "no line is cut");
        log::info!("room again");
        let after = drain(&mut reader);
        let [notice, line] = after.lines().collect::<Vec<_>>()[..] else { panic!("{after}") };
        assert!(
            notice.ends_with(&format!("] {lost} lines of the log were lost: their destination took no more"))
        );
        assert!(line.ends_with("] room again"), "{line}");
        assert_eq!(missed().lost, lost);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
    let name = "logger::tests::fifo_without_reader_loses_lines_and_their_number_follows";
    assert_good(&again_with(name, PATH, &fifo));
}

#[test]
fn full_device_loses_lines_and_nothing_else() {
    if is_one() {
        log_to_file();
        flood(5);
        write_if_free(b"raw\n");
        error_without_waiting("panic");
        assert_eq!(missed().lost, 7);
        return;
    }
    assert_good(&again_with("logger::tests::full_device_loses_lines_and_nothing_else", PATH, "/dev/full"));
}

fn limit_file_size(bytes: Option<u64>) {
    setrlimit(Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
}

/// As on a full disk: a part of the last line is written.
#[test]
fn line_after_a_torn_one_begins_on_its_own() {
    if is_one() {
        // SAFETY: ignoring a signal has no precondition.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let path = log_to_file();
        limit_file_size(Some(100));
        log::info!("{}", "x".repeat(200));
        log::info!("lost as a whole");
        limit_file_size(None);
        log::info!("whole again");
        let text = std::fs::read_to_string(&path).unwrap();
        let [torn, notice, line] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
        assert!(torn.len() == 100 && torn.ends_with('x'), "{torn}");
        assert!(notice.contains("] 2 lines of the log were lost"), "{notice}");
        assert!(line.ends_with("] whole again"), "{line}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    assert_good(&again_with("logger::tests::line_after_a_torn_one_begins_on_its_own", PATH, &log));
}

#[test]
fn destination_that_cannot_be_opened_changes_nothing() {
    if is_one() {
        install("vm");
        let nowhere = Some(Path::new("/nowhere/log").to_owned());
        let wanted = Logger { log_path: nowhere, level: Some(LogLevel::Off), ..Logger::default() };
        assert!(set_up(&wanted).is_err());
        log::info!("still here");
        return;
    }
    let ended = again("logger::tests::destination_that_cannot_be_opened_changes_nothing");
    assert_good(&ended);
    assert!(ended.stdout.contains("] still here\n"), "{ended:?}");
}
