//! A writer that is killed at any time leaves the old or the new snapshot, complete.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use config::HugePages;
use serde::{Deserialize, Serialize};
use snapshot::{AtomicFile, Header, Section, Snapshot, Writer};
use vesta_memory::GuestRam;
use vesta_memory::image::{ImageInfo, write_full};
use vm_memory::{Bytes, GuestAddress};

const MIB: u32 = 2;

/// The number of a snapshot of the writer. All of its memory has this byte.
#[derive(Serialize, Deserialize)]
struct Generation(u8);

impl Section for Generation {
    const NAME: &'static str = "generation";
}

/// Not a test: the process that another test kills. It writes one snapshot over the other.
#[test]
fn writer_process() {
    let Some(dir) = std::env::var_os("VESTA_TEST_WRITER") else { return };
    let (memory, state) = (Path::new(&dir).join("mem"), Path::new(&dir).join("state"));
    let ram = GuestRam::map(MIB, HugePages::None, false).unwrap();
    for generation in (1..=u8::MAX).cycle() {
        ram.memory().write_slice(&vec![generation; (MIB as usize) << 20], GuestAddress(0)).unwrap();
        let image = write_full(&ram, &memory, &()).unwrap();
        let mut writer = Writer::new(&Header::new("microvm", "test", 0)).unwrap();
        writer.put(&Generation(generation)).unwrap();
        writer.put(&image.info).unwrap();
        image.file.commit_with(writer.stage(AtomicFile::create(&state).unwrap()).unwrap()).unwrap();
        println!("one more");
    }
}

fn start(dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer_process", "--nocapture"])
        .env("VESTA_TEST_WRITER", dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.contains("one more") {
        assert_eq!(child.stdout.as_mut().unwrap().read(&mut byte).unwrap(), 1, "ended after {seen:?}");
        seen.push(char::from(byte[0]));
    }
    // Drain the pipe, so that a full one does not stop the writer.
    std::thread::spawn({
        let mut rest = child.stdout.take().unwrap();
        move || std::io::copy(&mut rest, &mut std::io::sink())
    });
    child
}

fn check(dir: &Path) {
    let state = Snapshot::open(&dir.join("state")).unwrap();
    state.expect_kind("microvm").unwrap();
    let Generation(generation) = state.get().unwrap();
    let info: ImageInfo = state.get().unwrap();
    let memory = snapshot::find(&dir.join("mem"), info.id);
    let ram = GuestRam::from_file(&info.layout, &memory, HugePages::None, false).unwrap();
    let mut bytes = vec![0; (MIB as usize) << 20];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert!(bytes.iter().all(|b| *b == generation), "the memory is not that of generation {generation}");
    for file in std::fs::read_dir(dir).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        assert!(name == "mem" || name == "state" || name.ends_with(".vesta-tmp"), "{name} was left behind");
    }
}

#[test]
fn killed_writer_leaves_one_whole_snapshot() {
    for parent in [std::env::temp_dir(), "/dev/shm".into()] {
        for round in 0..20u64 {
            let dir = tempfile::tempdir_in(&parent).unwrap();
            let mut child = start(dir.path());
            // Kill it at a different point of the next few snapshots in each round.
            std::thread::sleep(Duration::from_micros(round * 1709 % 23_000));
            child.kill().unwrap();
            child.wait().unwrap();
            check(dir.path());
        }
    }
}
