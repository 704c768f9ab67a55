//! State files of every released format stay readable; damaged ones are refused without a panic.

use std::fs;
use std::path::{Path, PathBuf};

use vesta_control::snapshot::{KIND, Saved};

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
fn samples_of_every_format_can_be_read_with_all_their_sections() {
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
fn a_state_file_that_is_cut_or_has_a_byte_changed_is_refused_by_name() {
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
