//! CPU templates by the API and by configuration files, through snapshots, and the tools for them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::counting::{unconfigured, wait_for_bytes};
use vesta_tests::cpu::is_intel;
use vesta_tests::elf::{Elf, null_guest};
use vesta_tests::guest::{Guest, TIMEOUT, start, vmm_path, vmm_with_api};
use vesta_tests::snapshots::{Files, pause};
use vesta_tests::vmm::VmmBuilder;

/// A template that changes one register of a leaf whose subleaf is 0.
fn template(leaf: &str, register: &str, bitmap: &str) -> Value {
    let modifiers = [json!({"register": register, "bitmap": bitmap})];
    json!({"cpuid_modifiers": [{"leaf": leaf, "subleaf": "0x0", "flags": 0, "modifiers": modifiers}]})
}

/// The stepping of the CPU, in leaf 1, is 9.
fn ninth_stepping() -> Value {
    template("0x1", "eax", "0b1001")
}

/// A guest that sends the stepping of its CPU over its serial port, without end.
fn stepping_guest() -> Elf {
    let code = [
        &[0xb8, 0x01, 0x00, 0x00, 0x00][..], // again: mov eax, 1
        &[0x0f, 0xa2],                       // cpuid
        &[0x83, 0xe0, 0x0f],                 // and eax, 15
        &[0x66, 0xba, 0xf8, 0x03],           // mov dx, 0x3f8
        &[0xee],                             // out dx, al
        &[0xeb, 0xef],                       // jmp again
    ];
    Elf::of(&code.concat())
}

fn kernel(dir: &Path, kernel: &Elf) -> Result<PathBuf> {
    let path = dir.join("kernel");
    fs::write(&path, kernel.bytes())?;
    Ok(path)
}

#[test]
fn template_beyond_the_host_is_refused_at_the_start() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    Guest::bare(&kernel(vmm.dir(), &null_guest())?).put(&mut api)?;
    // UINTR: no KVM supports it in guests.
    let uintr = format!("0b1{}", "x".repeat(5));
    let msr = json!({"msr_modifiers": [{"addr": "0x12345", "bitmap": "0b1"}]});
    for (template, named) in [
        (template("0x7", "edx", &uintr), "CPUID 0x7.0 edx bit 5"),
        (
            template("0x12345", "ebx", "0b0x"),
            "CPUID leaf 0x12345 subleaf 0x0, of which the template changes ebx bit 1",
        ),
        (msr, "(MSR) 0x12345"),
        (json!({"kvm_capabilities": ["9999"]}), "an unnamed capability (9999)"),
    ] {
        api.put("/cpu-config", &template)?.ok()?;
        let refused = api.put("/actions", &json!({"action_type": "InstanceStart"}))?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{refused:?}");
        ensure!(refused.fault().starts_with("cannot start the microVM: cpu-config: "), "{refused:?}");
        ensure!(api.get("/")?.json()?["state"] == "Not started");
    }
    api.put("/cpu-config", &json!({}))?.ok()?;
    start(&mut api)?;
    vmm.wait_for_output("Guest-boot-time =", TIMEOUT)?;
    let late = api.put("/cpu-config", &json!({}))?;
    ensure!(late.status == 400, "{late:?}");
    Ok(())
}

#[test]
fn static_template_of_another_vendor_is_refused_at_the_start() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let foreign = if is_intel() { "T2A" } else { "C3" };
    let guest = Guest {
        machine: json!({"cpu_template": foreign}),
        ..Guest::bare(&kernel(vmm.dir(), &null_guest())?)
    };
    guest.put(&mut api)?;
    let refused = api.put("/actions", &json!({"action_type": "InstanceStart"}))?;
    let named = format!("cpu_template {foreign}: it does not fit this host's CPU");
    ensure!(refused.status == 400 && refused.fault().contains(&named), "{refused:?}");
    // None takes it away.
    api.patch("/machine-config", &json!({"cpu_template": "None"}))?.ok()?;
    start(&mut api)
}

#[test]
fn last_template_is_shown_and_malformed_ones_change_nothing() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    let shown = |api: &mut vesta_tests::api::ApiClient| -> Result<(Value, Value)> {
        let config = api.get("/vm/config")?.ok()?.json()?;
        Ok((config["cpu-config"].clone(), config["machine-config"]["cpu_template"].clone()))
    };
    api.put("/cpu-config", &ninth_stepping())?.ok()?;
    let (custom, none) = shown(&mut api)?;
    let bitmap = &custom["cpuid_modifiers"][0]["modifiers"][0]["bitmap"];
    ensure!(*bitmap == json!(format!("0b{}1001", "x".repeat(28))) && none.is_null(), "{custom}");
    api.put("/cpu-config", &custom)?.ok()?;
    for (body, named) in [
        (r#"{"reg_modifiers":[]}"#, "`reg_modifiers`"),
        (r#"{"msr_modifiers":[{"addr":"8b","bitmap":"0b1"}]}"#, "addr is"),
        (r#"{"msr_modifiers":[{"addr":"0x8b","bitmap":"0b3"}]}"#, "'3' is no bit"),
        (
            r#"{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":8,"modifiers":[]}]}"#,
            "flags is 8; it must be between 0 and 7",
        ),
        ("null", "cannot be read"),
        ("", "needs a JSON body"),
    ] {
        let refused = api.request("PUT", "/cpu-config", Some(body))?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{body}: {refused:?}");
    }
    ensure!(shown(&mut api)? == (custom, Value::Null));
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2"});
    api.put("/machine-config", &machine)?.ok()?;
    ensure!(shown(&mut api)? == (Value::Null, json!("T2")));
    api.put("/cpu-config", &json!({}))?.ok()?;
    ensure!(shown(&mut api)? == (Value::Null, Value::Null));
    Ok(())
}

#[test]
fn guest_keeps_its_template_through_a_snapshot() -> Result<()> {
    let (vmm, mut api, serial) = unconfigured()?;
    Guest::bare(&kernel(vmm.dir(), &stepping_guest())?).mem_mib(16).put(&mut api)?;
    api.put("/cpu-config", &ninth_stepping())?.ok()?;
    let before = api.get("/vm/config")?.ok()?.json()?;
    start(&mut api)?;
    ensure!(wait_for_bytes(&serial, 10)?.iter().all(|stepping| *stepping == 9));
    let files = Files::new(vmm.dir(), "s");
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;

    let (_restored, mut api, serial) = unconfigured()?;
    // It describes no microVM to boot, and the loaded one has its own.
    api.put("/cpu-config", &template("0x1", "eax", "0b0111"))?.ok()?;
    api.put("/snapshot/load", &files.load())?.ok()?;
    ensure!(wait_for_bytes(&serial, 10)?.iter().all(|stepping| *stepping == 9));
    let after = api.get("/vm/config")?.ok()?.json()?;
    ensure!(after["cpu-config"] == before["cpu-config"] && !after["cpu-config"].is_null(), "{after}");
    Ok(())
}

#[test]
fn configuration_file_has_a_template_or_its_path() -> Result<()> {
    let home = tempfile::tempdir()?;
    let file = home.path().join("template.json");
    fs::write(&file, ninth_stepping().to_string())?;
    for section in [ninth_stepping(), json!(file)] {
        let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
        let mut config = Guest::bare(&kernel(builder.dir(), &stepping_guest())?).mem_mib(16).config();
        let serial = builder.dir().join("serial");
        config["cpu-config"] = section;
        config["serial"] = json!({"serial_out_path": serial});
        let _vmm = builder.with_config(&config)?.spawn()?;
        ensure!(wait_for_bytes(&serial, 10)?.iter().all(|stepping| *stepping == 9));
    }
    fs::write(&file, r#"{"msr_modifiers": 1}"#)?;
    for (path, named) in [(file.as_path(), "invalid CPU template"), (Path::new("/absent"), "cannot read")] {
        let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").quiet();
        let mut config = Guest::bare(&kernel(builder.dir(), &null_guest())?).config();
        config["cpu-config"] = json!(path);
        let (code, output) = builder.with_config(&config)?.spawn()?.finish(TIMEOUT)?;
        let path = path.display().to_string();
        ensure!(code == 152 && output.contains(named) && output.contains(&path), "{code}: {output}");
    }
    Ok(())
}

/// Runs the tool under Firecracker's name for it. Returns its exit code and its output.
fn helper(args: &[&str]) -> Result<(i32, String)> {
    let builder = VmmBuilder::new(&vmm_path())?.with_name("cpu-template-helper").quiet();
    args.iter().fold(builder, VmmBuilder::arg).spawn()?.finish(TIMEOUT)
}

/// The same, which must succeed.
fn good(args: &[&str]) -> Result<String> {
    let (code, output) = helper(args)?;
    ensure!(code == 0, "{args:?}: {code} {output}");
    Ok(output)
}

fn read(path: &str) -> Result<Value> {
    serde_json::from_slice(&fs::read(path)?).context(path.to_owned())
}

#[test]
fn dump_strip_and_verify_work_on_one_another() -> Result<()> {
    let home = tempfile::tempdir()?;
    let path = |name: &str| home.path().join(name).to_str().map(str::to_owned).context("a path");
    let (plain, nine, template) = (path("plain.json")?, path("nine.json")?, path("t.json")?);
    fs::write(&template, ninth_stepping().to_string())?;
    ensure!(good(&["--version"])? == "cpu-template-helper v1.17.0\n");
    good(&["template", "dump", "-o", &plain])?;
    good(&["template", "dump", "--template", &template, "--output", &nine])?;
    let dumped = read(&nine)?;
    ensure!(dumped["cpuid_modifiers"].as_array().is_some_and(|leaves| leaves.len() > 10), "{dumped}");
    ensure!(dumped["msr_modifiers"].as_array().is_some_and(|msrs| msrs.len() > 10), "{dumped}");
    // What a vCPU shows is a template for it, and so is the template itself.
    for of in [&nine, &plain, &template] {
        let report = good(&["template", "verify", "-t", of])?;
        ensure!(report.starts_with("the vCPU shows what the template says of "), "{report}");
    }

    good(&["template", "strip", "-p", &plain, &nine])?;
    let stripped = read(&path("nine_stripped.json")?)?;
    let leaves = stripped["cpuid_modifiers"].as_array().context("leaves")?;
    ensure!(
        leaves.len() == 1 && leaves[0]["leaf"] == "0x1" && stripped["msr_modifiers"] == json!([]),
        "{stripped}"
    );
    ensure!(read(&nine)? == dumped, "the input has changed");
    good(&["template", "strip", "--suffix", "", "--paths", &plain, &nine])?;
    ensure!(read(&nine)? == stripped, "the input was to be replaced");

    // The monitor clears this feature (PDCM), whatever the template says.
    let pdcm = json!({"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
        {"register": "ecx", "bitmap": format!("0b1{}", "x".repeat(15))}]}]});
    fs::write(&template, pdcm.to_string())?;
    let (code, output) = helper(&["template", "verify", "-t", &template])?;
    ensure!(
        code == 1 && output.contains("CPUID 0x1.0x0 ecx:\n  template xxxxxxxxxxxxxxxx1"),
        "{code}: {output}"
    );
    let (code, output) = helper(&["template", "strip", "-p", &plain])?;
    ensure!(code == 2 && output.contains("two or more files"), "{code}: {output}");
    let (code, output) = helper(&["template", "verify"])?;
    ensure!(code == 1 && output.contains("no template to verify"), "{code}: {output}");
    let (code, output) = helper(&["template", "dump", "-t", "/absent", "-o", &plain])?;
    ensure!(code == 1 && output.contains("/absent"), "{code}: {output}");
    Ok(())
}

#[test]
fn fingerprints_differ_where_the_cpu_does() -> Result<()> {
    let home = tempfile::tempdir()?;
    let path = |name: &str| home.path().join(name).to_str().map(str::to_owned).context("a path");
    let (old, new, config) = (path("old.json")?, path("new.json")?, path("config.json")?);
    good(&["fingerprint", "dump", "--output", &old])?;
    let written = read(&old)?;
    let mut keys: Vec<_> = written.as_object().context("an object")?.keys().map(String::as_str).collect();
    keys.sort_unstable();
    let all = [
        "bios_revision",
        "bios_version",
        "firecracker_version",
        "guest_cpu_config",
        "kernel_version",
        "microcode_version",
    ];
    ensure!(keys == all, "{keys:?}");
    ensure!(written["firecracker_version"] == "1.17.0", "{written}");
    good(&["fingerprint", "compare", "-p", &old, "-c", &old])?;

    let mut guest = Guest::bare(&kernel(home.path(), &null_guest())?).config();
    guest["cpu-config"] = ninth_stepping();
    fs::write(&config, guest.to_string())?;
    good(&["fingerprint", "dump", "-c", &config, "-o", &new])?;
    let compare = ["fingerprint", "compare", "-p", &old, "-c", &new];
    let (code, output) = helper(&compare)?;
    let difference = output.split_once("differ:\n").context("a difference")?.1;
    let difference: Value = serde_json::from_str(difference.trim())?;
    ensure!(code == 1 && difference["name"] == "guest_cpu_config", "{code}: {output}");
    ensure!(difference["curr"]["cpuid_modifiers"][0]["leaf"] == "0x1", "{difference}");
    let others = ["-f", "firecracker_version", "kernel_version", "bios_version"];
    good(&[&compare[..], &others].concat())?;
    Ok(())
}
