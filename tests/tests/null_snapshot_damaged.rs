//! Changed state files with valid checksums: each is refused or gives a microVM, and none crashes
//! the monitor.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use snapshot::{Section, Snapshot, Value, Writer};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{kernel, wait_for_bytes};
use vesta_tests::guest::{Guest, Transport, start};
use vesta_tests::pattern::mix;
use vesta_tests::snapshots::{Files, pause, unconfigured};
use vesta_tests::soak::rounds;
use vesta_tests::vmm::Vmm;

/// How many are tried on each transport.
const ROUNDS: u64 = 150;

/// A section with unparsed content.
macro_rules! raw_section {
    ($type:ident, $name:literal) => {
        #[derive(Serialize, Deserialize)]
        #[serde(transparent)]
        struct $type(Value);

        impl Section for $type {
            const NAME: &'static str = $name;
        }
    };
}

raw_section!(Config, "config");
raw_section!(Memory, "memory");
raw_section!(Machine, "machine");

/// All values in a value, itself first.
fn nodes<'a>(value: &'a mut Value, found: &mut dyn FnMut(&mut Value)) {
    found(value);
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| nodes(item, found)),
        Value::Map(fields) => fields.iter_mut().for_each(|(_, field)| nodes(field, found)),
        _ => {}
    }
}

/// Changes one value: a number to one at a bound, a list to a shorter or longer one, anything to
/// another type.
fn damage(value: &mut Value, seed: u64) {
    let mut count = 0;
    nodes(value, &mut |_| count += 1);
    let chosen = mix(seed) % count;
    let mut at = 0;
    nodes(value, &mut |node| {
        if at == chosen {
            *node = other(node, mix(seed ^ 0x5eed));
        }
        at += 1;
    });
}

fn other(old: &Value, choice: u64) -> Value {
    const NUMBERS: [u64; 8] = [0, 1, 255, 0xffff, 0x7fff_ffff, u32::MAX as u64, i64::MAX as u64, u64::MAX];
    let number = Value::from(NUMBERS[(choice >> 8) as usize % NUMBERS.len()]);
    match (old, choice % 8) {
        (Value::Array(items), 0..=2) => Value::Array(items.iter().skip(1).cloned().collect()),
        (Value::Array(items), 3..=5) => Value::Array(items.iter().chain(items).cloned().collect()),
        (Value::Map(fields), 0..=2) => Value::Map(fields.iter().skip(1).cloned().collect()),
        (Value::Bool(old), 0..=5) => Value::Bool(!old),
        (Value::Text(_), 0..=4) => Value::Text("/nowhere".repeat((choice >> 8) as usize % 40)),
        (_, 6) => Value::Null,
        _ => number,
    }
}

/// The field of a map.
fn field<'a>(value: &'a mut Value, name: &str) -> Result<&'a mut Value> {
    let fields = value.as_map_mut().context("a map")?;
    let found = fields.iter_mut().find(|(key, _)| key.as_text() == Some(name));
    Ok(&mut found.with_context(|| format!("a field {name}"))?.1)
}

/// Copies the file `from` to `to`, with one value changed. Values that go to KVM unchecked stay:
/// the kernel checks them.
fn damaged(from: &Files, to: &Files, seed: u64) -> Result<()> {
    let good = Snapshot::open(&from.state)?;
    let mut config = good.value(Config::NAME)?;
    let mut memory = good.value(Memory::NAME)?;
    let mut machine = good.value(Machine::NAME)?;
    match mix(!seed) % 8 {
        0..=2 => damage(&mut config, seed),
        3 => damage(&mut memory, seed),
        4..=6 => damage(field(&mut machine, "devices")?, seed),
        _ => damage(field(&mut machine, if seed & 1 == 0 { "serial" } else { "keyboard" })?, seed),
    }
    let mut writer = Writer::new(good.header())?;
    writer.put(&Config(config))?;
    writer.put(&Memory(memory))?;
    writer.put(&Machine(machine))?;
    Ok(writer.commit(&to.state)?)
}

/// Saves a guest with devices, whose paths are in `vmm`'s directory.
fn save(transport: Transport, vmm: &Vmm, api: &mut ApiClient) -> Result<Files> {
    let dir = vmm.dir();
    std::fs::write(dir.join("kernel"), kernel().bytes())?;
    File::create(dir.join("disk"))?.set_len(1 << 20)?;
    let limiter = json!({"bandwidth": {"size": 1 << 20, "refill_time": 100}});
    api.put("/serial", &json!({"serial_out_path": dir.join("serial")}))?.ok()?;
    let drive = json!({"drive_id": "data", "is_root_device": false, "path_on_host": dir.join("disk"),
        "overlay": {"path": dir.join("overlay")}, "rate_limiter": limiter});
    api.put("/drives/data", &drive)?.ok()?;
    api.put("/entropy", &json!({"rate_limiter": limiter}))?.ok()?;
    api.put("/vsock", &json!({"guest_cid": 3, "uds_path": dir.join("vsock")}))?.ok()?;
    Guest { machine: json!({"vcpu_count": 2}), ..Guest::bare(&dir.join("kernel")).mem_mib(16) }.put(api)?;
    start(api)?;
    wait_for_bytes(&dir.join("serial"), 2)?;
    pause(api)?;
    let files = Files::new(dir, "good");
    api.put("/snapshot/create", &files.create("Full"))?.ok().with_context(|| format!("{transport:?}"))?;
    Ok(files)
}

vesta_tests::on_each_transport! {
    fn a_damaged_state_file_is_refused_or_gives_a_valid_microvm(transport) {
        let (good, home) = {
            let (vmm, mut api) = unconfigured(transport)?;
            let files = save(transport, &vmm, &mut api)?;
            let home = tempfile::tempdir()?;
            for file in [&files.state, &files.memory, &vmm.dir().join("disk"), &vmm.dir().join("overlay")] {
                std::fs::copy(file, home.path().join(file.file_name().context("a name")?))?;
            }
            (Files::new(home.path(), "good"), home)
        };
        let bad = Files { state: home.path().join("bad.state"), memory: good.memory.clone() };
        let (mut loaded, mut refused) = (0, 0);
        let (mut vmm, mut api) = unconfigured(transport)?;
        for seed in 0..rounds(ROUNDS) {
            damaged(&good, &bad, seed)?;
            let mut load = bad.load();
            load["resume_vm"] = json!(false);
            load["drives"] = json!([{"drive_id": "data", "path_on_host": home.path().join("disk"),
                "overlay": {"path": home.path().join("overlay")}}]);
            load["vsock_override"] = json!({"uds_path": home.path().join("vsock")});
            let answer = api.put("/snapshot/load", &load).with_context(|| format!("round {seed}"))?;
            match answer.status {
                204 => {
                    loaded += 1;
                    (vmm, api) = unconfigured(transport)?;
                }
                400 => refused += 1,
                _ => ensure!(false, "round {seed}: {answer:?}"),
            }
            ensure!(vmm.is_running()?, "round {seed}");
        }
        // Otherwise nothing was damaged, or nothing got as far as the devices.
        ensure!(loaded > 0 && refused > 0, "{loaded} were loaded and {refused} refused");
        Ok(())
    }
}
