//! Forks and live snapshots of Linux guests under load: all continue from a common past and share
//! nothing after it.

use anyhow::ensure;
use serde_json::json;
use vesta_tests::busy::{
    BusyHost, Programs, check_output_after, wait_for_all_progress, wait_for_all_progress_in,
};
use vesta_tests::disks::{output_of, with};
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT};
use vesta_tests::on_each_transport;
use vesta_tests::serial_file::wait_for_text;
use vesta_tests::snapshots::{Files, wait_for_live_snapshot};

const PROGRAMS: Programs = Programs {
    disk_tool: env!("CARGO_BIN_EXE_disk-tool"),
    net_tool: env!("CARGO_BIN_EXE_net-tool"),
    guest_vsock: env!("CARGO_BIN_EXE_guest-vsock"),
};

on_each_transport! {
    /// A child, and a child of that child, all under load at the same time. The parent keeps its
    /// connections, the others start without any.
    fn parent_child_and_grandchild_keep_their_data_under_load(transport) {
        let home = tempfile::tempdir()?;
        let place = BusyHost::new(home.path())?;
        let mut vmm = place.guest(transport, PROGRAMS, &json!({}))?;
        wait_for_all_progress(&vmm)?;
        let (mut child, of_parent) = place.fork(&mut vmm.ready_client(TIMEOUT)?, "child")?;
        wait_for_all_progress_in(&child.serial)?;
        let (grandchild, of_child) = place.fork(&mut child.api, "grandchild")?;
        wait_for_all_progress_in(&grandchild.serial)?;
        wait_for_all_progress_in(&child.serial)?;
        wait_for_all_progress(&vmm)?;

        // All of them poll the same disk.
        place.disks.stop()?;
        check_output_after(&output_of(&mut vmm)?, 0, 0)?;
        for (guest, lives) in [(child, 1), (grandchild, 2)] {
            check_output_after(&wait_for_text(&guest.serial, "LAST", BOOT_TIMEOUT)?, lives, lives)?;
        }
        of_parent.wait(TIMEOUT)?;
        of_child.wait(TIMEOUT)
    }

    /// The guest runs while it is saved, and beside the restored one.
    fn a_live_snapshot_and_its_original_keep_their_data_under_load(transport) {
        let home = tempfile::tempdir()?;
        let place = BusyHost::new(home.path())?;
        let mut vmm = place.guest(transport, PROGRAMS, &json!({}))?;
        wait_for_all_progress(&vmm)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        let files = Files::new(home.path(), "live");
        let begun = api.put("/snapshot/create", &with(files.create("Full"), &json!({"live": true})))?;
        ensure!(begun.ok()?.json()?["state"] == "Running");
        wait_for_all_progress(&vmm)?;
        let job = wait_for_live_snapshot(&mut api)?;
        ensure!(job["state"] == "Done", "{job}");
        let mut loaded = place.restore_elsewhere(transport, "tap1", &files.load())?;
        wait_for_all_progress(&loaded)?;
        wait_for_all_progress(&vmm)?;

        place.disks.stop()?;
        check_output_after(&output_of(&mut vmm)?, 0, 0)?;
        check_output_after(&output_of(&mut loaded)?, 1, 1)
    }
}
