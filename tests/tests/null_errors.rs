//! Errors for invalid input: each names the thing and the bound, and the monitor stays usable. All
//! guests have a few instructions, so these tests run on a software KVM too.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::{ApiClient, Response};
use vesta_tests::elf::{Elf, LOAD_ADDRESS, Segment, null_guest};
use vesta_tests::guest::{Guest, TIMEOUT, ignore, start, vmm_path, vmm_with_api};
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// Exit codes of Firecracker.
const GENERIC_ERROR: i32 = 1;
const BAD_CONFIGURATION: i32 = 152;
const ARG_PARSING: i32 = 153;

/// A valid guest's kernel in the monitor's directory.
fn good_kernel(dir: &Path) -> Result<PathBuf> {
    let kernel = dir.join("good-kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    Ok(kernel)
}

/// The output of a monitor with this configuration file. It must end with [`BAD_CONFIGURATION`].
fn refused_from_file(config: impl FnOnce(&Path) -> Result<Value>) -> Result<String> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let config = config(builder.dir())?;
    let mut vmm = builder.with_config(&config)?.spawn()?;
    let (code, output) = vmm.finish(TIMEOUT)?;
    assert_eq!(code, BAD_CONFIGURATION, "output: {output}");
    Ok(output)
}

/// Puts a boot source and starts it. One of the two must be refused; returns the error.
fn refused_start(api: &mut ApiClient, guest: &Guest) -> Result<String> {
    let mut response = api.put("/machine-config", &guest.machine_config())?;
    if response.status == 204 {
        response = api.put("/boot-source", &guest.boot_source())?;
    }
    if response.status == 204 {
        response = api.put("/actions", &json!({"action_type": "InstanceStart"}))?;
    }
    fault(&response)
}

fn fault(response: &Response) -> Result<String> {
    assert_eq!(response.status, 400, "{}", response.body);
    let fault = response.fault();
    ensure!(!fault.is_empty(), "an error without a text: {}", response.body);
    Ok(fault)
}

/// After an error the monitor is not started, and can start a valid guest.
fn still_starts(vmm: &Vmm, api: &mut ApiClient) -> Result<()> {
    assert_eq!(api.get("/")?.json()?["state"], "Not started");
    Guest::bare(&good_kernel(vmm.dir())?).put(api)?;
    start(api)?;
    vmm.wait_for_output("Guest-boot-time =", TIMEOUT)?;
    Ok(())
}

/// A kernel with this content is refused over the API and from a file, with a text that has all
/// `words`.
fn kernel_is_refused(content: &[u8], words: &[&str]) -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let kernel = vmm.dir().join("bad-kernel");
    std::fs::write(&kernel, content)?;
    let over_api = refused_start(&mut api, &Guest::bare(&kernel))?;
    still_starts(&vmm, &mut api)?;
    let from_file = refused_from_file(|_| Ok(Guest::bare(&kernel).config()))?;
    for word in words {
        ensure!(over_api.contains(word), "{word} is not in the API's answer: {over_api}");
        ensure!(from_file.contains(word), "no {word} in: {from_file}");
    }
    Ok(())
}

#[test]
fn a_missing_kernel_is_named() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let kernel = vmm.dir().join("no-such-kernel");
    let over_api = refused_start(&mut api, &Guest::bare(&kernel))?;
    ensure!(over_api.contains("no-such-kernel"), "{over_api}");
    still_starts(&vmm, &mut api)?;
    let from_file = refused_from_file(|_| Ok(Guest::bare(&kernel).config()))?;
    ensure!(from_file.contains("no-such-kernel"), "{from_file}");
    Ok(())
}

#[test]
fn a_missing_initrd_is_named() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let mut guest = Guest::bare(&good_kernel(vmm.dir())?);
    guest.initrd = Some(vmm.dir().join("no-such-initrd"));
    let over_api = refused_start(&mut api, &guest)?;
    ensure!(over_api.contains("no-such-initrd"), "{over_api}");
    still_starts(&vmm, &mut api)
}

#[test]
fn a_directory_is_no_kernel() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    refused_start(&mut api, &Guest::bare(vmm.dir()))?;
    still_starts(&vmm, &mut api)
}

#[test]
fn an_empty_file_is_no_kernel() -> Result<()> {
    kernel_is_refused(b"", &[])
}

#[test]
fn a_text_is_no_kernel() -> Result<()> {
    kernel_is_refused("not a kernel\n".repeat(1000).as_bytes(), &[])
}

#[test]
fn a_kernel_with_truncated_headers_is_refused() -> Result<()> {
    kernel_is_refused(&null_guest().bytes()[..70], &[])
}

#[test]
fn a_segment_beyond_the_file_is_refused() -> Result<()> {
    let mut elf = null_guest();
    elf.segments[0].claimed_size = Some(1 << 20);
    kernel_is_refused(&elf.bytes(), &[])
}

#[test]
fn a_segment_outside_memory_is_refused_with_its_address() -> Result<()> {
    let mut elf = null_guest();
    // The guest has 128 MiB.
    elf.segments.push(Segment::new(0x4000_0000, &[0xf4]));
    kernel_is_refused(&elf.bytes(), &["0x40000000"])
}

#[test]
fn a_segment_that_crosses_the_end_of_memory_is_refused() -> Result<()> {
    let mut elf = null_guest();
    elf.segments.push(Segment { memory_size: 1 << 40, ..Segment::new(0x20_0000, &[0xf4]) });
    kernel_is_refused(&elf.bytes(), &["0x200000"])
}

#[test]
fn a_segment_whose_end_overflows_is_refused() -> Result<()> {
    let mut elf = null_guest();
    elf.segments.push(Segment { memory_size: u64::MAX, ..Segment::new(u64::MAX - 0xfff, &[0xf4]) });
    kernel_is_refused(&elf.bytes(), &[])
}

#[test]
fn overlapping_segments_are_refused() -> Result<()> {
    let mut elf = null_guest();
    elf.segments.push(Segment::new(u64::from(LOAD_ADDRESS) + 4, &[0x90; 64]));
    kernel_is_refused(&elf.bytes(), &[])
}

#[test]
fn a_kernel_without_an_entry_is_refused() -> Result<()> {
    kernel_is_refused(&Elf { entry: 0, pvh_entry: None, ..null_guest() }.bytes(), &[])
}

#[test]
fn a_kernel_with_a_pvh_entry_of_zero_is_refused() -> Result<()> {
    kernel_is_refused(&Elf { entry: 0, pvh_entry: Some(0), ..null_guest() }.bytes(), &[])
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_with_both_sizes() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let mut guest = Guest::bare(&good_kernel(vmm.dir())?);
    let initrd = vmm.dir().join("initrd");
    // A sparse file.
    File::create(&initrd)?.set_len(200 << 20)?;
    guest.initrd = Some(initrd);
    let output = refused_start(&mut api, &guest)?;
    ensure!(output.contains("initrd") && output.contains(&(200 << 20).to_string()), "{output}");
    still_starts(&vmm, &mut api)
}

#[test]
fn a_too_long_command_line_is_refused_with_the_bound() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let guest = Guest::bare(&good_kernel(vmm.dir())?).boot_args(&"x".repeat(2049));
    let output = fault(&api.put("/boot-source", &guest.boot_source())?)?;
    ensure!(output.contains("2048") && output.contains("2049"), "{output}");
    still_starts(&vmm, &mut api)?;
    let output = refused_from_file(|_| Ok(guest.config()))?;
    ensure!(output.contains("2048"), "{output}");
    Ok(())
}

#[test]
fn invalid_vcpu_counts_are_refused_with_the_bounds() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    for vcpus in [0, 129, 255] {
        let guest = Guest::bare(&good_kernel(vmm.dir())?).vcpus(vcpus);
        let output = fault(&api.put("/machine-config", &guest.machine_config())?)?;
        ensure!(output.contains("vcpu_count") && output.contains("128"), "{output}");
        let output = refused_from_file(|_| Ok(guest.config()))?;
        ensure!(output.contains("vcpu_count") && output.contains("128"), "{output}");
    }
    assert_eq!(api.get("/machine-config")?.json()?["vcpu_count"], 1);
    still_starts(&vmm, &mut api)
}

#[test]
fn invalid_memory_sizes_are_refused_with_the_bounds() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    for mem_mib in [0, (1 << 20) + 1] {
        let guest = Guest::bare(&good_kernel(vmm.dir())?).mem_mib(mem_mib);
        let output = fault(&api.put("/machine-config", &guest.machine_config())?)?;
        ensure!(output.contains("mem_size_mib") && output.contains(&(1 << 20).to_string()), "{output}");
    }
    assert_eq!(api.get("/machine-config")?.json()?["mem_size_mib"], 128);
    still_starts(&vmm, &mut api)
}

#[test]
fn unavailable_memory_is_refused_and_the_monitor_continues() -> Result<()> {
    let info = std::fs::read_to_string("/proc/meminfo")?;
    let free = info.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).map(str::trim);
    match free {
        None => ignore("this kernel has no huge pages of 2 MiB"),
        Some("0") => {}
        Some(free) => ignore(&format!("{free} huge pages are free, and the test needs an empty pool")),
    }
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let mut guest = Guest::bare(&good_kernel(vmm.dir())?);
    guest.machine = json!({"huge_pages": "2M"});
    let output = refused_start(&mut api, &guest)?;
    ensure!(
        output.contains("128") || output.contains(&(128 << 20).to_string()),
        "the size is not in: {output}"
    );
    still_starts(&vmm, &mut api)
}

#[test]
fn an_unknown_key_of_a_configuration_file_is_named() -> Result<()> {
    let output = refused_from_file(|dir| {
        let mut config = Guest::bare(&good_kernel(dir)?).config();
        config["machine-confg"] = json!({});
        Ok(config)
    })?;
    ensure!(output.contains("machine-confg"), "{output}");
    Ok(())
}

#[test]
fn an_unknown_key_within_a_section_is_named() -> Result<()> {
    let output = refused_from_file(|dir| {
        let mut config = Guest::bare(&good_kernel(dir)?).config();
        config["boot-source"]["boot_arg"] = json!("quiet");
        Ok(config)
    })?;
    ensure!(output.contains("boot_arg"), "{output}");
    Ok(())
}

#[test]
fn an_invalid_json_file_is_refused_with_line_and_column() -> Result<()> {
    let builder =
        VmmBuilder::new(&vmm_path())?.arg("--no-api").with_config_text("{\n\"boot-source\": nonsense}")?;
    let (code, output) = builder.spawn()?.finish(TIMEOUT)?;
    assert_eq!(code, BAD_CONFIGURATION, "output: {output}");
    ensure!(output.contains("line 2"), "{output}");
    Ok(())
}

#[test]
fn a_missing_configuration_file_is_named() -> Result<()> {
    let builder =
        VmmBuilder::new(&vmm_path())?.arg("--no-api").arg("--config-file").arg("/nonexistent/config.json");
    let (code, output) = builder.spawn()?.finish(TIMEOUT)?;
    assert_ne!(code, 0);
    ensure!(output.contains("/nonexistent/config.json"), "{output}");
    Ok(())
}

#[test]
fn an_unknown_key_over_the_api_is_named() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let body = json!({"vcpu_count": 1, "mem_size_mib": 128, "memory": 1});
    let output = fault(&api.put("/machine-config", &body)?)?;
    ensure!(output.contains("memory"), "{output}");
    still_starts(&vmm, &mut api)
}

#[test]
fn a_start_without_a_kernel_is_refused() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    fault(&api.put("/actions", &json!({"action_type": "InstanceStart"}))?)?;
    still_starts(&vmm, &mut api)
}

#[test]
fn a_second_start_is_refused_and_the_guest_continues() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    still_starts(&vmm, &mut api)?;
    fault(&api.put("/actions", &json!({"action_type": "InstanceStart"}))?)?;
    assert_eq!(api.get("/")?.json()?["state"], "Running");
    Ok(())
}

#[test]
fn requests_for_a_running_guest_are_refused_before_the_start() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    fault(&api.patch("/vm", &json!({"state": "Paused"}))?)?;
    fault(&api.put("/actions", &json!({"action_type": "SendCtrlAltDel"}))?)?;
    still_starts(&vmm, &mut api)
}

#[test]
fn a_socket_in_use_is_named_and_not_removed() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let socket = vmm.dir().join("api.sock");
    let (code, output) =
        VmmBuilder::new(&vmm_path())?.arg("--api-sock").arg(&socket).spawn()?.finish(TIMEOUT)?;
    assert_eq!(code, GENERIC_ERROR, "output: {output}");
    ensure!(output.contains(&socket.display().to_string()), "{output}");
    api.get("/")?.ok()?;
    Ok(())
}

#[test]
fn invalid_arguments_are_named() -> Result<()> {
    let cases: [(&[&str], &str); 5] = [
        (&["--no-such-flag"], "no-such-flag"),
        (&["--api-sock"], "api-sock"),
        (&["--no-api"], "config-file"),
        (&["--id", "one", "--id", "two"], "id"),
        (&["--http-api-max-payload-size", "much"], "http-api-max-payload-size"),
    ];
    for (args, word) in cases {
        let builder = args.iter().fold(VmmBuilder::new(&vmm_path())?, VmmBuilder::arg);
        let (code, output) = builder.spawn()?.finish(TIMEOUT)?;
        assert_eq!(code, ARG_PARSING, "{args:?}: output: {output}");
        ensure!(output.contains(word), "{args:?}: {output}");
    }
    Ok(())
}

#[test]
fn exit_status_is_firecrackers_under_its_name() -> Result<()> {
    let home = tempfile::tempdir()?;
    let bad = home.path().join("bad.json");
    std::fs::write(&bad, "{")?;
    let bad = bad.to_str().unwrap_or_default();
    let cases: [(&[&str], &str, i32, i32); 5] = [
        (&["--level", "nope"], "nope", ARG_PARSING, BAD_CONFIGURATION),
        (&["--id", "a_b"], "a_b", ARG_PARSING, ARG_PARSING),
        (
            &["--no-api", "--config-file", "/nonexistent/c"],
            "/nonexistent/c",
            BAD_CONFIGURATION,
            GENERIC_ERROR,
        ),
        (&["--no-api", "--config-file", bad], "bad.json", BAD_CONFIGURATION, GENERIC_ERROR),
        (&["--metadata", "/nonexistent/m"], "/nonexistent/m", BAD_CONFIGURATION, GENERIC_ERROR),
    ];
    for (args, named, own, firecrackers) in cases {
        for (name, status) in [("vesta-vmm", own), ("firecracker", firecrackers)] {
            let builder = VmmBuilder::new(&vmm_path())?.with_name(name);
            let builder = args.iter().fold(builder, VmmBuilder::arg);
            let (code, output) = builder.spawn()?.finish(TIMEOUT)?;
            assert_eq!(code, status, "{name} {args:?}: output: {output}");
            ensure!(output.contains(named), "{args:?}: {output}");
        }
    }
    Ok(())
}
