//! Many clones of one Linux guest: all have the same past, and no two are the same.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::disks::DiskGuest;
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT};
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::{wait_for_text, word};
use vesta_tests::vsock::{connect, port};

const TOOL: &str = env!("CARGO_BIN_EXE_guest-vsock");
const CLONES: u32 = 50;
/// The CID of the first clone.
const FIRST_CID: u32 = 100;

/// Prints its identity once it is a clone: what its kernel, its monitor and its host make random,
/// and the 16 bytes of the VM generation ID, which are in the monitor's page at 0xde000.
const WHO_AM_I: &str = r#"
hex() { hexdump -v -e '/1 "%02x"'; }
generation() { dd if=/dev/mem bs=16 skip=$((0xde00)) count=1 2>/dev/null | hex; }
guest-vsock serve &
echo FIRST $(generation)
until dmesg | grep -q 'crng reseeded due to virtual machine fork'; do usleep 300000; done
echo KERNEL $(head -c 16 /dev/urandom | hex)
echo DEVICE $(head -c 16 /dev/hwrng | hex)
read uuid </proc/sys/kernel/random/uuid; echo UUID $uuid
echo GENERATION $(generation)
guest-vsock cid
echo LAST
sleep 100000"#;

/// What must differ in each.
const DISTINCT: [&str; 5] = ["KERNEL ", "DEVICE ", "UUID ", "GENERATION ", "CID "];

fn path(dir: &Path, clone: u32, what: &str) -> std::path::PathBuf {
    dir.join(format!("{clone}.{what}"))
}

fn child(dir: &Path, clone: u32) -> Value {
    json!({
        "id": format!("clone-{clone}"),
        "api_socket": path(dir, clone, "api"),
        "serial": {"serial_out_path": path(dir, clone, "serial")},
        "vsock_override": {"uds_path": path(dir, clone, "vsock"), "guest_cid": FIRST_CID + clone},
    })
}

on_each_transport! {
    fn fifty_clones_of_one_guest_run_independently(transport) {
        let home = tempfile::tempdir()?;
        let dir = home.path();
        let vmm = DiskGuest::new(transport)?
            .mem_mib(64)
            .entropy(json!({}))
            .program("guest-vsock", TOOL)
            .device("vsock", json!({"guest_cid": 3, "uds_path": dir.join("parent.vsock")}))
            .run(WHO_AM_I)?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        let first = vmm.wait_for_output("FIRST ", BOOT_TIMEOUT)?;
        let mut seen = DISTINCT.map(|_| BTreeSet::new());
        seen[3].insert(word(&first, "FIRST ")?.to_owned());

        let mut api = vmm.ready_client(TIMEOUT)?;
        let children: Vec<_> = (0..CLONES).map(|clone| child(dir, clone)).collect();
        let reply = api.put("/fork", &json!({"children": children}))?.ok()?.json()?;
        let orphans = Orphans::of_fork(&reply)?;
        for clone in 0..CLONES {
            let output = wait_for_text(&path(dir, clone, "serial"), "LAST", BOOT_TIMEOUT)?;
            for (what, seen) in DISTINCT.iter().zip(&mut seen) {
                let found = word(&output, what)?;
                ensure!(seen.insert(found.to_owned()), "clone {clone}: {what}{found} was seen before");
            }
            ensure!(word(&output, "CID ")? == (FIRST_CID + clone).to_string(), "{output}");
            let about = ApiClient::new(&path(dir, clone, "api")).get("/")?.ok()?.json()?;
            ensure!(about["id"] == format!("clone-{clone}") && about["state"] == "Running", "{about}");
            is_answered(&path(dir, clone, "vsock")).with_context(|| format!("clone {clone}"))?;
        }
        is_answered(&dir.join("parent.vsock")).context("the parent")?;
        ensure!(!vmm.stdout.text().contains("KERNEL"), "the parent is the same guest as before");
        ensure!(orphans.running()? == CLONES as usize);
        orphans.kill(TIMEOUT)
    }
}

/// Whether a program in the guest behind that socket responds.
fn is_answered(socket: &Path) -> Result<()> {
    let mut stream = connect(socket, port::ECHO)?;
    stream.write_all(b"who is there")?;
    let mut back = [0; 12];
    stream.read_exact(&mut back)?;
    ensure!(&back == b"who is there");
    Ok(())
}
