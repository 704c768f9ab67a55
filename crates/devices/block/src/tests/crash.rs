//! What an overlay has after a kill of its monitor, and after a crash of the host.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use super::rig::*;

const SIZE: u64 = 4 << 20;

fn new_base(dir: &Path) -> PathBuf {
    let path = dir.join("base");
    std::fs::write(&path, pattern(0x55, 0, SIZE)).unwrap();
    path
}

/// Copies the file as the kernel has it: what a kill of the process at this moment leaves.
fn as_if_killed(top: &Path) -> PathBuf {
    let copy = top.with_added_extension("killed");
    std::fs::copy(top, &copy).unwrap();
    copy
}

/// Changes the session in `top` to one of another boot of the host.
pub(crate) fn as_if_host_crashed(top: &Path) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(top).unwrap();
    let mut session = [0; 40];
    file.read_exact_at(&mut session, 4096).unwrap();
    session[8] ^= 1;
    session[24] ^= 0x80;
    let crc = crc32fast::hash(&session[..36]);
    session[36..].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&session, 4096).unwrap();
}

#[test]
fn overlay_keeps_completed_writes_after_a_kill() {
    for engine in ENGINES {
        for cache_type in [CacheType::Unsafe, CacheType::Writeback] {
            let dir = tempfile::tempdir().unwrap();
            let base = new_base(dir.path());
            let top = dir.path().join("top");
            let options = DiskOptions { cache_type, ..overlaid(&base, top.clone(), vec![], engine) };
            let mut rig = Rig::open(&options);
            rig.write(SECTOR, &[1; 3 * 512]).unwrap();
            rig.do_now(0, Request::Flush).unwrap();
            rig.write(100 * SECTOR, &[2; 512]).unwrap();
            rig.do_now(200 * SECTOR, Request::Discard { len: SECTOR }).unwrap();

            let killed = as_if_killed(&top);
            let mut rig = Rig::open(&DiskOptions { cache_type, ..overlaid(&base, killed, vec![], engine) });
            let mut expected = pattern(0x55, 0, SIZE);
            expected[512..2048].fill(1);
            expected[100 * 512..101 * 512].fill(2);
            expected[200 * 512..201 * 512].fill(0);
            assert!(rig.read(0, SIZE).unwrap() == expected, "{engine:?} {cache_type:?}");
        }
    }
}

#[test]
fn overlay_has_what_was_flushed_after_a_host_crash() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let base = new_base(dir.path());
        let top = dir.path().join("top");
        let mut rig = Rig::open(&overlaid(&base, top.clone(), vec![], engine));
        rig.write(0, &[1; 512]).unwrap();
        rig.do_now(0, Request::Flush).unwrap();
        rig.write(512, &[2; 512]).unwrap();

        let killed = as_if_killed(&top);
        as_if_host_crashed(&killed);
        let options = overlaid(&base, killed, vec![], engine);
        let mut rig = Rig::open(&options);
        assert_eq!(rig.read(0, 512).unwrap(), [1; 512]);
        assert_eq!(rig.read(512, 512).unwrap(), pattern(0x55, 512, 512));
        // Lost sectors stay lost, also for a monitor that does not wait for the disk.
        drop(rig);
        let mut rig = Rig::open(&DiskOptions { cache_type: CacheType::Unsafe, ..options });
        assert_eq!(rig.read(512, 512).unwrap(), pattern(0x55, 512, 512));
    }
}

#[test]
fn closed_or_unsafe_overlay_is_complete_on_any_host() {
    for engine in ENGINES {
        for cache_type in [CacheType::Unsafe, CacheType::Writeback] {
            let dir = tempfile::tempdir().unwrap();
            let base = new_base(dir.path());
            let top = dir.path().join("top");
            let options = DiskOptions { cache_type, ..overlaid(&base, top.clone(), vec![], engine) };
            let mut rig = Rig::open(&options);
            rig.write(0, &[1; 512]).unwrap();
            let moved = if cache_type == CacheType::Unsafe {
                as_if_killed(&top)
            } else {
                drop(rig);
                top
            };
            as_if_host_crashed(&moved);
            let mut rig = Rig::open(&overlaid(&base, moved, vec![], engine));
            assert_eq!(rig.read(0, 512).unwrap(), [1; 512]);
        }
    }
}

/// Sectors that only the commit map has must be in the durable map before the next session.
#[test]
fn writes_before_a_kill_survive_a_later_host_crash() {
    let dir = tempfile::tempdir().unwrap();
    let base = new_base(dir.path());
    let top = dir.path().join("top");
    let mut rig = Rig::open(&overlaid(&base, top.clone(), vec![], IoEngine::Async));
    rig.write(0, &[1; 512]).unwrap();
    let killed = as_if_killed(&top);
    let second = Rig::open(&overlaid(&base, killed.clone(), vec![], IoEngine::Async));
    let again = as_if_killed(&killed);
    drop(second);
    as_if_host_crashed(&again);
    let mut rig = Rig::open(&overlaid(&base, again, vec![], IoEngine::Async));
    assert_eq!(rig.read(0, 512).unwrap(), [1; 512]);
}

/// The monitor ends properly, and then the host crashes, or the file is moved to another host.
#[test]
fn closed_overlay_keeps_all_writes_on_any_host() {
    for engine in ENGINES {
        for cache_type in [CacheType::Unsafe, CacheType::Writeback] {
            let dir = tempfile::tempdir().unwrap();
            let base = new_base(dir.path());
            let top = dir.path().join("top");
            let options = DiskOptions { cache_type, ..overlaid(&base, top.clone(), vec![], engine) };
            let mut rig = Rig::open(&options);
            rig.write(0, &[1; 512]).unwrap();
            rig.disk.close().unwrap();
            let closed = as_if_killed(&top);
            as_if_host_crashed(&closed);
            let again = overlaid(&base, closed, vec![], engine);
            assert_eq!(Rig::open(&again).read(0, 512).unwrap(), [1; 512]);
            // A new session after the close is not taken for closed.
            rig.write(512, &[2; 512]).unwrap();
            let killed = as_if_killed(&top);
            if cache_type == CacheType::Writeback {
                as_if_host_crashed(&killed);
                let again = overlaid(&base, killed, vec![], engine);
                assert_eq!(Rig::open(&again).read(512, 512).unwrap(), pattern(0x55, 512, 512));
            }
        }
    }
}

/// The monitor that opens and closes the overlay completes it, also without a write.
#[test]
fn overlay_of_a_killed_monitor_is_closed_by_the_next_one() {
    for cache_type in [CacheType::Unsafe, CacheType::Writeback] {
        let dir = tempfile::tempdir().unwrap();
        let base = new_base(dir.path());
        let top = dir.path().join("top");
        let mut rig = Rig::open(&overlaid(&base, top.clone(), vec![], IoEngine::Async));
        rig.write(0, &[1; 512]).unwrap();
        let killed = as_if_killed(&top);
        let again = DiskOptions { cache_type, ..overlaid(&base, killed.clone(), vec![], IoEngine::Async) };
        drop(Rig::open(&again));
        as_if_host_crashed(&killed);
        assert_eq!(Rig::open(&again).read(0, 512).unwrap(), [1; 512], "{cache_type:?}");
    }
}

const VICTIM: &str = "tests::crash::victim_writes_until_it_is_killed";

/// Not a test by itself, but the process that the next test kills. Writes in rounds, flushes some,
/// and prints each.
#[test]
#[ignore = "run by another test"]
fn victim_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os("VESTA_TEST_VICTIM_DIR").map(PathBuf::from) else { return };
    let engine =
        if std::env::var_os("VESTA_TEST_VICTIM_SYNC").is_some() { IoEngine::Sync } else { IoEngine::Async };
    let mut rig = Rig::open(&overlaid(&dir.join("base"), dir.join("top"), vec![], engine));
    for round in 1u8..=250 {
        for slot in 0..8u64 {
            // Odd sectors, and more of the disk with each round.
            let sector = 1 + slot * 900 + u64::from(round % 50) * 16;
            rig.start_write(sector * SECTOR, &[round; 1024], 512);
        }
        rig.finish();
        if round % 3 == 0 {
            rig.do_now(0, Request::Flush).unwrap();
            println!("flushed {round}");
        }
    }
    println!("end");
    std::thread::park();
}

#[test]
fn overlay_keeps_flushed_writes_after_sigkill() {
    for (engine, stop_at) in [(IoEngine::Async, 30), (IoEngine::Sync, 60), (IoEngine::Async, 249)] {
        let dir = tempfile::tempdir().unwrap();
        new_base(dir.path());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", VICTIM, "--ignored", "--nocapture"])
            .env("VESTA_TEST_VICTIM_DIR", dir.path());
        if engine == IoEngine::Sync {
            command.env("VESTA_TEST_VICTIM_SYNC", "1");
        }
        let mut victim = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(victim.stdout.take().unwrap());
        let mut flushed = 0;
        for line in stdout.lines() {
            let line = line.unwrap();
            if let Some(round) = line.split("flushed ").nth(1) {
                flushed = round.parse::<u8>().unwrap();
            }
            if flushed >= stop_at {
                // SIGKILL, in the middle of its work.
                victim.kill().unwrap();
            }
        }
        victim.wait().unwrap();
        assert!(flushed >= stop_at, "the victim ended on its own after {flushed}");

        let mut rig = Rig::open(&overlaid(&dir.path().join("base"), dir.path().join("top"), vec![], engine));
        let got = rig.read(0, SIZE).unwrap();
        for slot in 0..8u64 {
            for round in 1..=flushed {
                // The last round that wrote there. Rounds after the flush may be there or not.
                let place = |round: u8| 1 + slot * 900 + u64::from(round % 50) * 16;
                let last = (1..=flushed).rev().find(|&r| place(r) == place(round)).unwrap();
                let at = (place(round) * SECTOR) as usize;
                for sector in got[at..at + 1024].chunks(512) {
                    let found = sector[0];
                    assert!(sector.iter().all(|&b| b == found));
                    assert!(
                        found >= last && place(found) == place(round),
                        "slot {slot} round {round}: {found}, not {last}"
                    );
                }
            }
        }
        let untouched = (7 + 900 * 7) * SECTOR;
        let expected = pattern(0x55, untouched, 512);
        assert_eq!(got[untouched as usize..untouched as usize + 512], expected);
    }
}
