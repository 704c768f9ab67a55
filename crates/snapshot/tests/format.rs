//! The format of state files: what is written is read back, and damage is refused.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use vesta_snapshot::{Header, MigrateError, ReadError, Section, Snapshot, Value, WriteError, Writer};

/// A file in version 1 of the format, with the contents of [`sample`]. It must always stay
/// readable.
const SAMPLE_V1: &[u8] = include_bytes!("samples/format-1.state");

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Clock {
    tsc_khz: u32,
    now: u64,
}

impl Section for Clock {
    const NAME: &'static str = "clock";
    const VERSION: u16 = 2;

    /// Version 1 had the frequency in MHz.
    fn migrate(from: u16, mut value: Value) -> Result<Value, MigrateError> {
        assert_eq!(from, 1);
        for (key, value) in value.as_map_mut().ok_or_else(|| MigrateError("not a map".into()))? {
            if key.as_text() == Some("tsc_mhz") {
                *key = "tsc_khz".into();
                let mhz = value.as_integer().and_then(|n| u32::try_from(n).ok());
                let mhz = mhz.ok_or_else(|| MigrateError("tsc_mhz is not a number".into()))?;
                *value = (u64::from(mhz) * 1000).into();
            }
        }
        Ok(value)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct OldClock {
    tsc_mhz: u32,
    now: u64,
}

impl Section for OldClock {
    const NAME: &'static str = "clock";
}

#[derive(Debug, Serialize, Deserialize)]
struct NewestClock {
    seconds: f64,
}

impl Section for NewestClock {
    const NAME: &'static str = "clock";
    const VERSION: u16 = 3;
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Queue {
    ready: bool,
    rings: Vec<u64>,
    blob: Vec<u8>,
    mode: Mode,
    names: BTreeMap<String, Option<i64>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Mode {
    Off,
    At(u32, f64),
    Named { text: String },
}

impl Section for Queue {
    const NAME: &'static str = "device/queue";
}

fn header() -> Header {
    Header {
        kind: "microvm".into(),
        architecture: "x86_64".into(),
        vesta_version: "0.1.0".into(),
        created_by: "a test".into(),
        created_at_ms: 1_795_500_000_000,
    }
}

fn queue() -> Queue {
    Queue {
        ready: true,
        rings: vec![0, 1, u64::MAX],
        blob: (0..=255).collect(),
        mode: Mode::At(7, 0.5),
        names: [("none".to_owned(), None), ("some".to_owned(), Some(i64::MIN))].into(),
    }
}

fn sample() -> Vec<u8> {
    let mut writer = Writer::new(&header()).unwrap();
    writer.put(&Clock { tsc_khz: 2_400_000, now: 99 }).unwrap();
    writer.put_instance("a", &queue()).unwrap();
    writer.put_instance("b", &Queue { mode: Mode::Off, ready: false, ..queue() }).unwrap();
    writer.finish().unwrap()
}

fn parse(bytes: &[u8]) -> Result<Snapshot, ReadError> {
    Snapshot::parse(Path::new("a.state"), bytes.to_vec())
}

/// A file with one section.
fn one<S: Section>(section: &S) -> Snapshot {
    let mut writer = Writer::new(&header()).unwrap();
    writer.put(section).unwrap();
    parse(&writer.finish().unwrap()).unwrap()
}

/// An empty file with another header.
fn header_with(change: impl FnOnce(&mut Header)) -> Snapshot {
    let mut changed = header();
    change(&mut changed);
    parse(&Writer::new(&changed).unwrap().finish().unwrap()).unwrap()
}

#[test]
fn sections_are_read_back_as_written() {
    let file = parse(&sample()).unwrap();
    assert_eq!(*file.header(), header());
    assert_eq!(file.get::<Clock>().unwrap(), Clock { tsc_khz: 2_400_000, now: 99 });
    assert_eq!(file.get_instance::<Queue>("a").unwrap(), queue());
    assert_eq!(file.get_instance::<Queue>("b").unwrap().mode, Mode::Off);
    assert_eq!(file.instances::<Queue>().collect::<Vec<_>>(), ["a", "b"]);
    file.expect_kind("microvm").unwrap();
}

#[test]
fn sample_of_format_version_1_loads() {
    let file = parse(SAMPLE_V1).unwrap();
    assert_eq!(file.get::<Clock>().unwrap(), Clock { tsc_khz: 2_400_000, now: 99 });
    assert_eq!(file.get_instance::<Queue>("a").unwrap(), queue());
}

#[test]
fn writer_still_writes_format_version_1() {
    assert_eq!(sample(), SAMPLE_V1, "the bytes of the format changed: that is a new format version");
}

#[test]
fn every_truncation_is_refused() {
    let whole = sample();
    for len in 0..whole.len() {
        let error = parse(&whole[..len]).unwrap_err();
        assert!(matches!(error, ReadError::Truncated { .. }), "at {len}: {error}");
    }
}

#[test]
fn every_flipped_byte_is_refused() {
    let whole = sample();
    for at in 0..whole.len() {
        for bits in [0x01, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= bits;
            assert!(parse(&bytes).is_err(), "at {at}, bits {bits:#x}");
        }
    }
}

#[test]
fn bytes_after_the_end_are_refused() {
    let mut bytes = sample();
    let len = bytes.len();
    bytes.push(0);
    let error = parse(&bytes).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("state file a.state: the file at offset {len} is malformed: data after the end")
    );
}

#[test]
fn sections_of_two_files_cannot_be_mixed() {
    let one = sample();
    let mut writer = Writer::new(&Header { created_by: "b test".into(), ..header() }).unwrap();
    writer.put(&Clock { tsc_khz: 1, now: 1 }).unwrap();
    let other = writer.finish().unwrap();
    // The header of one file and the rest of the other. Both headers have the same length.
    let len = u32::from_le_bytes(one[12..16].try_into().unwrap()) as usize + 20;
    let mixed = [&one[..len], &other[len..]].concat();
    let error = parse(&mixed).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "state file a.state: it is damaged: wrong checksum of the end at offset {}",
            other.len() - 12
        )
    );
}

#[test]
fn damage_is_named_by_section_and_offset() {
    let mut bytes = sample();
    let info = parse(&bytes).unwrap().sections()[1].clone();
    bytes[info.offset + 5] ^= 1;
    let error = parse(&bytes).unwrap_err().to_string();
    let start = info.offset - info.name.len() - 16;
    let wanted = format!(
        "state file a.state: it is damaged: wrong checksum of section \"device/queue/a\" at offset {start}"
    );
    assert_eq!(error, wanted);
}

#[test]
fn newer_format_version_is_refused() {
    let mut bytes = sample();
    bytes[8] = 2;
    let error = parse(&bytes).unwrap_err().to_string();
    assert_eq!(error, "state file a.state: it has format version 2; this vesta reads versions 1 to 1");
}

#[test]
fn other_file_types_are_refused() {
    let error = parse(b"#!/bin/sh\nexit 0\n").unwrap_err().to_string();
    assert_eq!(error, "file a.state: it is not a state file of vesta");
}

#[test]
fn other_architecture_is_described_but_not_restored() {
    let file = header_with(|h| h.architecture = "aarch64".into());
    assert_eq!(file.describe().header.architecture, "aarch64");
    let error = file.expect_kind("microvm").unwrap_err().to_string();
    assert_eq!(error, "state file a.state: it was saved on aarch64; this host is x86_64");
}

#[test]
fn other_kind_of_file_is_refused() {
    let error = parse(&sample()).unwrap().expect_kind("working-set").unwrap_err().to_string();
    assert_eq!(error, "state file a.state: it holds \"microvm\", not \"working-set\"");
}

#[test]
fn older_section_is_migrated() {
    let file = one(&OldClock { tsc_mhz: 2400, now: 5 });
    assert_eq!(file.get::<Clock>().unwrap(), Clock { tsc_khz: 2_400_000, now: 5 });
}

#[test]
fn newer_section_version_is_refused() {
    let error = one(&NewestClock { seconds: 1.0 }).get::<Clock>().unwrap_err().to_string();
    assert_eq!(error, "state file a.state: section clock has version 3; this vesta reads versions 1 to 2");
}

#[test]
fn section_without_migration_is_refused() {
    let error = one(&OldClock { tsc_mhz: 1, now: 1 }).get::<NewestClock>().unwrap_err().to_string();
    assert_eq!(error, "state file a.state: section clock: version 1 is no longer understood");
}

#[test]
fn missing_section_error_names_it() {
    let file = one(&OldClock { tsc_mhz: 1, now: 1 });
    let error = file.get_instance::<Queue>("x").unwrap_err().to_string();
    assert_eq!(error, "state file a.state: it has no section device/queue/x");
    assert!(file.get_optional::<Queue>().unwrap().is_none());
}

#[test]
fn unknown_fields_are_skipped_and_missing_ones_named() {
    #[derive(Debug, Serialize, Deserialize)]
    struct Wide {
        tsc_khz: u32,
        now: u64,
        added_later: Vec<String>,
    }
    impl Section for Wide {
        const NAME: &'static str = "clock";
        const VERSION: u16 = 2;
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Wrong {
        now: u64,
    }
    impl Section for Wrong {
        const NAME: &'static str = "clock";
        const VERSION: u16 = 2;
    }
    let file = one(&Wide { tsc_khz: 1, now: 2, added_later: vec!["x".into()] });
    assert_eq!(file.get::<Clock>().unwrap(), Clock { tsc_khz: 1, now: 2 });
    let error = one(&Wrong { now: 1 }).get::<Clock>().unwrap_err().to_string();
    assert_eq!(error, "state file a.state: section clock: missing field `tsc_khz`");
}

#[test]
fn writer_refuses_a_duplicate_section() {
    let mut writer = Writer::new(&header()).unwrap();
    writer.put(&Clock { tsc_khz: 1, now: 1 }).unwrap();
    let error = writer.put(&Clock { tsc_khz: 1, now: 1 }).unwrap_err();
    assert!(matches!(&error, WriteError::Section { section, .. } if section == "clock"), "{error}");
}

#[test]
fn file_is_written_described_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.state");
    let mut writer = Writer::new(&header()).unwrap();
    writer.put(&Clock { tsc_khz: 1, now: 2 }).unwrap();
    writer.commit(&path).unwrap();
    let description = vesta_snapshot::verify(&path).unwrap();
    assert_eq!(description, vesta_snapshot::describe(&path).unwrap());
    let json = serde_json::to_value(&description).unwrap();
    assert_eq!(json["format_version"], 1);
    assert_eq!(json["kind"], "microvm");
    assert_eq!(json["sections"][0]["name"], "clock");
    assert_eq!(json["size"], std::fs::metadata(&path).unwrap().len());
    assert!(description.to_string().contains("section         clock, version 2, "), "{description}");
}

#[test]
fn fifo_and_directory_are_refused_without_blocking() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(matches!(Snapshot::open(&fifo), Err(ReadError::NotAFile { .. })));
    assert!(matches!(Snapshot::open(dir.path()), Err(ReadError::NotAFile { .. })));
    assert!(matches!(Snapshot::open(&dir.path().join("none")), Err(ReadError::Io { .. })));
}

#[test]
fn oversized_file_is_refused_unread() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let error = Snapshot::open(&path).unwrap_err().to_string();
    assert!(error.ends_with("it has 1099511627776 bytes; at most 67108864"), "{error}");
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Off),
        (any::<u32>(), -1e9..1e9f64).prop_map(|(n, x)| Mode::At(n, x)),
        ".{0,20}".prop_map(|text| Mode::Named { text }),
    ]
}

prop_compose! {
    fn any_queue()(
        ready in any::<bool>(),
        rings in proptest::collection::vec(any::<u64>(), 0..20),
        blob in proptest::collection::vec(any::<u8>(), 0..500),
        mode in mode(),
        names in proptest::collection::btree_map(".{0,8}", any::<Option<i64>>(), 0..6),
    ) -> Queue {
        Queue { ready, rings, blob, mode, names }
    }
}

proptest! {
    #[test]
    fn any_sections_round_trip(
        queues in proptest::collection::btree_map("[a-z0-9_-]{1,20}", any_queue(), 0..8)
    ) {
        let mut writer = Writer::new(&header()).unwrap();
        for (name, queue) in &queues {
            writer.put_instance(name, queue).unwrap();
        }
        let file = parse(&writer.finish().unwrap()).unwrap();
        let names: Vec<_> = file.instances::<Queue>().map(str::to_owned).collect();
        prop_assert_eq!(&names, &queues.keys().cloned().collect::<Vec<_>>());
        for name in names {
            prop_assert_eq!(&file.get_instance::<Queue>(&name).unwrap(), &queues[&name]);
        }
    }

    #[test]
    fn any_damage_is_detected(
        at in any::<proptest::sample::Index>(),
        bytes in proptest::collection::vec(any::<u8>(), 1..40),
    ) {
        let whole = sample();
        let at = at.index(whole.len());
        let mut damaged = whole.clone();
        let end = (at + bytes.len()).min(whole.len());
        damaged[at..end].copy_from_slice(&bytes[..end - at]);
        prop_assert_eq!(parse(&damaged).is_ok(), damaged == whole);
    }
}
