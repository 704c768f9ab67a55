//! State files of every released format stay readable; damaged ones are refused without a panic.

use std::fs;
use std::path::{Path, PathBuf};

use machine::MachineState;
use memory::{ImageRegion, MemoryLayout};
use snapshot::{Section, Snapshot, Value};
use vesta_control::snapshot::{KIND, Saved, VerifyError, verify};

/// The samples, each with its bytes.
fn samples() -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/samples");
    let mut samples: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "state"))
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    samples.sort();
    samples
}

#[test]
fn samples_of_every_format_are_read_with_all_sections() {
    let samples = samples();
    assert!(samples.len() >= 2, "there are samples of both transports");
    for (path, _) in samples {
        let saved = Saved::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(saved.config.id, "sample");
        assert_eq!(saved.config.pci, path.to_string_lossy().contains("pci"));
        assert_eq!(saved.machine.vcpus.len(), usize::from(saved.config.config.machine_config.vcpu_count));
        assert_eq!(saved.machine.devices.devices.len(), saved.config.config.drives.len() + 1);
    }
}

#[test]
fn truncated_or_changed_state_file_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.state");
    for (_, bytes) in samples() {
        let damaged = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let Err(error) = Saved::open(&path) else { panic!("it is damaged") };
            let error = error.to_string();
            assert!(error.contains("damaged.state"), "{error}");
        };
        for len in (0..bytes.len()).step_by(bytes.len() / 500 + 1) {
            damaged(&bytes[..len]);
        }
        for at in (0..bytes.len()).step_by(bytes.len() / 500 + 1) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x41;
            damaged(&flipped);
        }
    }
    assert_eq!(KIND, "microvm");
}

/// Writes `saved` as a file whose checksums are right.
fn write(saved: &Saved, path: &Path) {
    let mut writer = snapshot::Writer::new(&saved.description.header).unwrap();
    writer.put(&saved.config).unwrap();
    writer.put(&saved.image).unwrap();
    writer.put(&saved.machine).unwrap();
    writer.commit(path).unwrap();
}

#[test]
fn state_file_with_inconsistent_sections_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crafted.state");
    let sample = Saved::open(&samples()[0].0).unwrap();
    let refused = |change: &dyn Fn(&mut Saved)| {
        let mut crafted = sample.clone();
        change(&mut crafted);
        write(&crafted, &path);
        let error = Saved::load(&path).unwrap_err();
        assert_eq!(error.to_string(), verify(&path, None).unwrap_err().to_string());
        assert!(error.to_string().contains("crafted.state"), "{error}");
        error
    };
    // Memory of the right size where no first MiB is: the monitor writes there.
    let away = ImageRegion { guest_addr: 4 << 30, size: 16 << 20, offset: 0 };
    let error = refused(&|saved| saved.image.layout = MemoryLayout::try_from(vec![away]).unwrap());
    assert!(matches!(error, VerifyError::Layout { mem_size_mib: 16, .. }), "{error}");
    let error = refused(&|saved| saved.image.layout = MemoryLayout::of_size(17));
    assert!(matches!(error, VerifyError::Disagree { what: "bytes of memory", .. }), "{error}");
    let error = refused(&|saved| drop(saved.machine.vcpus.pop()));
    assert!(matches!(error, VerifyError::Disagree { what: "vCPUs", .. }), "{error}");
    let error = refused(&|saved| saved.config.config.machine_config.mem_size_mib = 0);
    assert!(matches!(error, VerifyError::Config { .. }), "{error}");
    write(&sample, &path);
    Saved::load(&path).unwrap();
}

#[test]
fn machine_state_survives_write_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("again.state");
    for (sample, _) in samples() {
        let saved = Saved::open(&sample).unwrap();
        write(&saved, &path);
        let again = Saved::open(&path).unwrap();
        assert_eq!(format!("{:?}", again.machine), format!("{:?}", saved.machine));
        assert_eq!(again.config, saved.config);
    }
}

/// The section `machine` as its CBOR tree.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct MachineTree(Value);

impl Section for MachineTree {
    const NAME: &'static str = MachineState::NAME;
}

impl MachineTree {
    /// The byte strings under a field of a map, each with the name of its own field.
    fn byte_strings<'a>(field: &str, tree: &'a mut Value) -> Vec<(String, &'a mut Vec<u8>)> {
        match tree {
            Value::Bytes(bytes) => vec![(field.to_owned(), bytes)],
            Value::Array(items) => {
                items.iter_mut().flat_map(|item| Self::byte_strings(field, item)).collect()
            }
            Value::Map(fields) => fields
                .iter_mut()
                .flat_map(|(key, value)| Self::byte_strings(key.as_text().unwrap_or_default(), value))
                .collect(),
            _ => Vec::new(),
        }
    }

    fn write(&self, like: &Saved, path: &Path) {
        let mut writer = snapshot::Writer::new(&like.description.header).unwrap();
        writer.put(&like.config).unwrap();
        writer.put(&like.image).unwrap();
        writer.put(self).unwrap();
        writer.commit(path).unwrap();
    }
}

#[test]
fn kvm_structure_of_another_size_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crafted.state");
    let sample = Saved::open(&samples()[0].0).unwrap();
    write(&sample, &path);
    let tree = || MachineTree(Snapshot::open(&path).unwrap().value(MachineState::NAME).unwrap());
    let structures = MachineTree::byte_strings("", &mut tree().0).len();
    let mut refused = Vec::new();
    for at in 0..structures {
        for longer in [false, true] {
            let mut crafted = tree();
            let mut strings = MachineTree::byte_strings("", &mut crafted.0);
            let (field, bytes) = &mut strings[at];
            let field = field.clone();
            if longer {
                bytes.push(0);
            } else {
                bytes.pop();
            }
            let crafted_path = dir.path().join("other.state");
            crafted.write(&sample, &crafted_path);
            match Saved::load(&crafted_path) {
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains("kvm_") && error.contains("saved size is"), "{field}: {error}");
                    refused.push(field);
                }
                // Of any length: extended state, which is checked against the host at a restore,
                // and bytes for the serial port.
                Ok(_) => assert!(field == "xsave" || field == "received", "{field}"),
            }
        }
    }
    refused.sort();
    refused.dedup();
    let expected =
        ["clock", "debug", "events", "irqchips", "lapic", "mp_state", "pit", "regs", "sregs", "xcrs"];
    assert_eq!(refused, expected);
}

/// Larger than what the decoder lends out as a slice.
#[test]
fn state_of_a_nested_guest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nested.state");
    let sample = Saved::open(&samples()[0].0).unwrap();
    write(&sample, &path);
    let mut tree = MachineTree(Snapshot::open(&path).unwrap().value(MachineState::NAME).unwrap());
    let vcpus = tree.0.as_map_mut().unwrap().iter_mut().find(|(key, _)| key.as_text() == Some("vcpus"));
    let vcpu = vcpus.unwrap().1.as_array_mut().unwrap()[0].as_map_mut().unwrap();
    vcpu.retain(|(key, _)| key.as_text() != Some("nested"));
    vcpu.push((Value::Text("nested".to_owned()), Value::Bytes(vec![0; 8320])));
    tree.write(&sample, &path);
    Saved::load(&path).unwrap();
}
