//! Snapshots of Linux guests under load, which resume in other monitors with all data intact.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vesta_tests::busy::{
    BusyHost, Programs, check_output_after, finish_and_check, save_and_kill, wait_for_all_progress,
};
use vesta_tests::disks::{DiskGuest, disk, drive, with};
use vesta_tests::guest::{BOOT_TIMEOUT, Transport};
use vesta_tests::on_each_transport;
use vesta_tests::page_server::PageServer;
use vesta_tests::snapshots::{Files, restore};
use vesta_tests::vsock::{connect, port};

const PROGRAMS: Programs = Programs {
    disk_tool: env!("CARGO_BIN_EXE_disk-tool"),
    net_tool: env!("CARGO_BIN_EXE_net-tool"),
    guest_vsock: env!("CARGO_BIN_EXE_guest-vsock"),
};
const PAGE_SERVER: &str = env!("CARGO_BIN_EXE_page-server");

/// How a guest is saved and loaded.
#[derive(Default)]
struct How {
    diff: bool,
    tracked: bool,
    page_server: bool,
}

/// A guest under load is saved and restored in a new monitor, three times, with the same network. A
/// first Full snapshot is loaded again at the end, with the disks of that time, in another network.
fn three_generations(transport: Transport, how: &How) -> Result<()> {
    let home = tempfile::tempdir()?;
    let place = BusyHost::new(home.path())?;
    let track = json!({"track_dirty_pages": how.tracked});
    let mut vmm = place.guest(transport, PROGRAMS, &track)?;
    let (mut first, mut page_server) = (None, None);
    for generation in 0..3 {
        wait_for_all_progress(&vmm)?;
        // A Diff goes onto the existing memory file, a Full one into a new file.
        let full = !how.diff || generation == 0;
        let mut files = Files::new(home.path(), &format!("generation{generation}"));
        if how.diff {
            files.memory = home.path().join("memory");
        }
        save_and_kill(vmm, &files, if full { "Full" } else { "Diff" })?;
        if !how.diff && generation == 0 {
            first = Some((place.disks.copies(home.path(), "first")?, files.clone()));
        }
        let mut load = with(files.load(), &track);
        if how.page_server {
            // Its guest has ended.
            drop(page_server.take());
            let server = page_server.insert(PageServer::start(PAGE_SERVER, &files.memory, "all")?);
            load["mem_backend"] = json!({"backend_type": "Uffd", "backend_path": server.socket()});
        }
        // The sockets of the killed monitor.
        std::fs::remove_file(place.socket("v"))?;
        let (next, _api) = restore(transport, &load)?;
        // The guest's servers can be reached, whatever happened to older connections.
        connect(&place.socket("v"), port::ECHO).context("the guest after a load")?;
        vmm = next;
    }
    wait_for_all_progress(&vmm)?;
    check_output_after(&finish_and_check(vmm, &place.disks)?, 3, 0)?;

    let Some(((copies, drives), files)) = first else { return Ok(()) };
    let load = with(files.load(), &json!({"drives": drives}));
    let vmm = place.restore_elsewhere(transport, "tap1", &load)?;
    wait_for_all_progress(&vmm)?;
    check_output_after(&finish_and_check(vmm, &copies)?, 1, 1)
}

on_each_transport! {
    fn a_guest_under_load_survives_three_full_snapshots(transport) {
        three_generations(transport, &How::default())
    }

    fn a_guest_under_load_survives_three_diffs_of_tracked_pages(transport) {
        three_generations(transport, &How { diff: true, tracked: true, ..How::default() })
    }

    fn a_guest_under_load_survives_three_diffs_without_tracking(transport) {
        three_generations(transport, &How { diff: true, ..How::default() })
    }

    /// Each time, all of its memory comes from another process, page by page.
    fn a_guest_under_load_survives_three_page_servers(transport) {
        three_generations(transport, &How { diff: true, page_server: true, ..How::default() })
    }

    /// Memory that is read ahead of the guest is intact.
    fn a_guest_under_load_survives_a_prefetching_restore(transport) {
        let home = tempfile::tempdir()?;
        let place = BusyHost::new(home.path())?;
        let vmm = place.guest(transport, PROGRAMS, &json!({}))?;
        wait_for_all_progress(&vmm)?;
        let files = Files::new(home.path(), "a");
        save_and_kill(vmm, &files, "Full")?;
        for (name, sign) in [("tap1", "is recorded"), ("tap2", "pages are prefetched")] {
            let (copies, drives) = place.disks.copies(home.path(), name)?;
            let load = with(files.load(), &json!({"drives": drives, "prefetch": true}));
            let vmm = place.restore_elsewhere(transport, name, &load)?;
            vmm.wait_for_output(sign, BOOT_TIMEOUT)?;
            wait_for_all_progress(&vmm)?;
            check_output_after(&finish_and_check(vmm, &copies)?, 1, 1)?;
        }
        ensure!(home.path().join("a.memory.working-set").exists());
        Ok(())
    }
}

/// The variable for the rounds of the test below, for a soak.
const ROUNDS: &str = "VESTA_TEST_ROUNDS";

/// Case 10: eight programs write with `O_DIRECT` to a disk with `io_engine` Async, and the guest is
/// saved and restored in another monitor.
#[test]
fn direct_writers_continue_after_each_restore() -> Result<()> {
    const WRITERS: usize = 8;
    let rounds = std::env::var(ROUNDS).map_or(Ok(3), |rounds| rounds.parse()).context(ROUNDS)?;
    let home = tempfile::tempdir()?;
    let async_disk = with(drive("data", &disk(home.path(), "data", 64)?), &json!({"io_engine": "Async"}));
    let script = format!(
        "\
        write() {{ n=0; while dd if=/dev/zero of=/dev/vda bs=64k count=16 seek=$((16 * $1)) oflag=direct conv=notrunc 2>/dev/null\n\
          do n=$((n + 1)); echo WRITER $1 DID $n; done; echo WRITER $1 FAILED; }}\n\
        for i in $(seq 0 {last}); do write $i & done; wait",
        last = WRITERS - 1
    );
    let mut vmm = DiskGuest::new(Transport::Mmio)?.vcpus(2).drive(async_disk).run(&script)?;
    for round in 0..=rounds {
        for writer in 0..WRITERS {
            vmm.wait_for_output(&format!("WRITER {writer} DID "), BOOT_TIMEOUT)
                .with_context(|| format!("writer {writer} after {round} restores"))?;
        }
        ensure!(!vmm.stdout.text().contains("FAILED"), "{}", vmm.stdout.text());
        if round < rounds {
            let files = Files::new(home.path(), "saved");
            save_and_kill(vmm, &files, "Full")?;
            (vmm, _) = restore(Transport::Mmio, &files.load())?;
        }
    }
    Ok(())
}
