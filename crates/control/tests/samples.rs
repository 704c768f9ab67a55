//! State files of every released format stay readable; damaged ones are refused without a panic.

use std::fs;
use std::path::{Path, PathBuf};

use memory::{ImageRegion, MemoryLayout};
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

/// Writes `saved` as a file whose checksums are right.
fn write(saved: &Saved, path: &Path) {
    let mut writer = snapshot::Writer::new(&saved.description.header).unwrap();
    writer.put(&saved.config).unwrap();
    writer.put(&saved.image).unwrap();
    writer.put(&saved.machine).unwrap();
    writer.commit(path).unwrap();
}

#[test]
fn a_state_file_whose_sections_cannot_be_of_one_microvm_is_refused_by_a_load_and_by_verify() {
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
