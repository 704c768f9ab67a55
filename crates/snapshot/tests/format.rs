//! The state file: what is written is read back, and nothing else is.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use vesta_snapshot::{Header, MigrateError, ReadError, Section, Snapshot, Value, WriteError, Writer};

/// A file that version 1 of the format wrote, with what [`sample`] writes today. It must stay readable for ever.
const SAMPLE_V1: &[u8] = include_bytes!("samples/format-1.state");

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Clock {
    tsc_khz: u32,
    now: u64,
}

impl Section for Clock {
    const NAME: &'static str = "clock";
    const VERSION: u16 = 2;

    /// Version 1 counted in MHz.
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
fn what_is_written_is_read_back() {
    let file = parse(&sample()).unwrap();
    assert_eq!(*file.header(), header());
    assert_eq!(file.get::<Clock>().unwrap(), Clock { tsc_khz: 2_400_000, now: 99 });
    assert_eq!(file.get_instance::<Queue>("a").unwrap(), queue());
    assert_eq!(file.get_instance::<Queue>("b").unwrap().mode, Mode::Off);
    assert_eq!(file.instances::<Queue>().collect::<Vec<_>>(), ["a", "b"]);
    file.expect_kind("microvm").unwrap();
}

#[test]
fn a_file_of_format_version_1_loads() {
    let file = parse(SAMPLE_V1).unwrap();
    assert_eq!(file.get::<Clock>().unwrap(), Clock { tsc_khz: 2_400_000, now: 99 });
    assert_eq!(file.get_instance::<Queue>("a").unwrap(), queue());
}

#[test]
fn the_writer_still_writes_format_version_1() {
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
    assert_eq!(error, format!("a.state is malformed: the file at offset {len}: data after the end"));
}

#[test]
fn sections_of_two_files_cannot_be_mixed() {
    let one = sample();
    let mut writer = Writer::new(&Header { created_by: "b test".into(), ..header() }).unwrap();
    writer.put(&Clock { tsc_khz: 1, now: 1 }).unwrap();
    let other = writer.finish().unwrap();
    // The header of one, all else of the other; both headers have the same length.
    let len = u32::from_le_bytes(one[12..16].try_into().unwrap()) as usize + 20;
    let mixed = [&one[..len], &other[len..]].concat();
    let error = parse(&mixed).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("a.state is damaged: wrong checksum of the end at offset {}", other.len() - 12)
    );
}

#[test]
fn damage_is_named_by_section_and_offset() {
    let mut bytes = sample();
    let info = parse(&bytes).unwrap().sections()[1].clone();
    bytes[info.offset + 5] ^= 1;
    let error = parse(&bytes).unwrap_err().to_string();
    let start = info.offset - info.name.len() - 16;
    let wanted =
        format!("a.state is damaged: wrong checksum of section \"device/queue/a\" at offset {start}");
    assert_eq!(error, wanted);
}

#[test]
fn a_later_format_version_is_refused_by_number() {
    let mut bytes = sample();
    bytes[8] = 2;
    let error = parse(&bytes).unwrap_err().to_string();
    assert_eq!(error, "a.state has format version 2; this vesta reads versions 1 to 1");
}

#[test]
fn what_is_no_state_file_is_called_that() {
    let error = parse(b"#!/bin/sh\nexit 0\n").unwrap_err().to_string();
    assert_eq!(error, "a.state is not a state file of vesta");
}

#[test]
fn another_architecture_can_be_described_but_not_used() {
    let file = header_with(|h| h.architecture = "aarch64".into());
    assert_eq!(file.describe().header.architecture, "aarch64");
    let error = file.expect_kind("microvm").unwrap_err().to_string();
    assert_eq!(error, "a.state was made on aarch64; this machine is x86_64");
}

#[test]
fn another_kind_of_file_is_refused() {
    let error = parse(&sample()).unwrap().expect_kind("working-set").unwrap_err().to_string();
    assert_eq!(error, "a.state holds \"microvm\", not \"working-set\"");
}

#[test]
fn an_older_section_is_brought_up_to_date() {
    let file = one(&OldClock { tsc_mhz: 2400, now: 5 });
    assert_eq!(file.get::<Clock>().unwrap(), Clock { tsc_khz: 2_400_000, now: 5 });
}

#[test]
fn a_newer_section_is_refused_by_name() {
    let error = one(&NewestClock { seconds: 1.0 }).get::<Clock>().unwrap_err().to_string();
    assert_eq!(error, "a.state: section clock has version 3; this vesta reads versions 1 to 2");
}

#[test]
fn a_section_without_a_way_up_is_refused() {
    let error = one(&OldClock { tsc_mhz: 1, now: 1 }).get::<NewestClock>().unwrap_err().to_string();
    assert_eq!(error, "a.state: section clock: version 1 is no longer understood");
}

#[test]
fn a_missing_section_is_named() {
    let file = one(&OldClock { tsc_mhz: 1, now: 1 });
    let error = file.get_instance::<Queue>("x").unwrap_err().to_string();
    assert_eq!(error, "a.state has no section device/queue/x");
    assert!(file.get_optional::<Queue>().unwrap().is_none());
}

#[test]
fn unknown_sections_and_fields_are_tolerated_and_data_of_the_wrong_shape_is_named() {
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
    assert_eq!(error, "a.state: section clock: missing field `tsc_khz`");
}

#[test]
fn a_name_twice_is_refused_when_writing() {
    let mut writer = Writer::new(&header()).unwrap();
    writer.put(&Clock { tsc_khz: 1, now: 1 }).unwrap();
    let error = writer.put(&Clock { tsc_khz: 1, now: 1 }).unwrap_err();
    assert!(matches!(&error, WriteError::Section { section, .. } if section == "clock"), "{error}");
}

#[test]
fn a_file_is_written_read_described_and_verified() {
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
fn what_is_not_a_regular_file_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(matches!(Snapshot::open(&fifo), Err(ReadError::NotAFile { .. })));
    assert!(matches!(Snapshot::open(dir.path()), Err(ReadError::NotAFile { .. })));
    assert!(matches!(Snapshot::open(&dir.path().join("none")), Err(ReadError::Io { .. })));
}

#[test]
fn a_file_beyond_the_bound_is_refused_unread() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let error = Snapshot::open(&path).unwrap_err().to_string();
    assert!(error.ends_with("has 1099511627776 bytes; a state file has at most 67108864"), "{error}");
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
    fn any_sections_come_back_as_they_were(
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
    fn any_damage_is_an_error_or_no_damage(
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
