//! Full disks.
//!
//! A limit on the size of files (`RLIMIT_FSIZE`), which needs no privileges, stands for a full
//! disk. It applies to a whole process, and exceeding it raises a signal that ends a process which
//! does not ignore it. So the test has a process of its own, which ignores the signal.

use std::fs::File;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::guest::Guest;
use super::rig::*;

const MIB: u64 = 1 << 20;
const PROCESS: &str = "tests::full::full_disk_in_its_own_process";

#[test]
fn full_disk_fails_writes_until_there_is_space() {
    let ignoring = "trap '' XFSZ; exec \"$@\"";
    let output = Command::new("sh")
        .args(["-c", ignoring, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", PROCESS, "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}{errors}", output.status);
}

/// Sets the limit for the files of this process, in bytes.
fn limit_files(to: Option<u64>) {
    setrlimit(Resource::Fsize, Rlimit { current: to, ..getrlimit(Resource::Fsize) }).unwrap();
}

#[test]
#[ignore = "started by full_disk_fails_writes_until_there_is_space"]
fn full_disk_in_its_own_process() {
    for engine in ENGINES {
        for (cache_type, with_overlay) in
            [(CacheType::Unsafe, true), (CacheType::Writeback, true), (CacheType::Writeback, false)]
        {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("base");
            File::create(&base).unwrap().set_len(64 * MIB).unwrap();
            let kind = raw_or_overlaid(&base, &dir.path().join("top"), with_overlay, engine);
            let mut guest = Guest::new(&DiskOptions { cache_type, ..kind });
            limit_files(Some(20 * MIB));
            let data = vec![7; 1 << 20];
            let statuses: Vec<u8> = (0..40).map(|mib| guest.write(mib * 2048, &data)).collect();
            assert_eq!(statuses[0], 0);
            assert_eq!(*statuses.last().unwrap(), 1, "{statuses:?}");
            assert_eq!(guest.read(2047, 1), (0, vec![7; 512]));
            assert_eq!(guest.read(63 * 2048, 1), (0, vec![0; 512]));
            assert!(guest.control.stats().execute_fails.get() > 0);
            limit_files(None);
            assert_eq!(guest.write(39 * 2048, &data), 0);
            assert_eq!(guest.read(40 * 2048 - 1, 1), (0, vec![7; 512]));
            assert_eq!(guest.read(2047, 1), (0, vec![7; 512]));
        }
    }
}
