//! The entry point for fuzzing: parses any bytes as a state file.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::section::{MigrateError, Section};
use crate::{Snapshot, Value};

/// A section with fields of all shapes.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Anything {
    #[serde(default)]
    number: Option<u64>,
    #[serde(default)]
    list: Vec<Vec<u8>>,
    #[serde(default)]
    choice: Option<Choice>,
    #[serde(flatten)]
    rest: std::collections::BTreeMap<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Choice {
    Unit,
    Tuple(u8, String),
    Struct { map: std::collections::BTreeMap<String, i64> },
}

impl Section for Anything {
    const NAME: &'static str = "anything";
    const VERSION: u16 = 2;

    fn migrate(_: u16, value: Value) -> Result<Value, MigrateError> {
        Ok(value)
    }
}

/// Parses `data` as a state file, and as the data of a section in a file with valid checksums.
pub fn decode(data: &[u8]) {
    parse(data.to_vec());
    parse(sealed(data));
}

/// Parses a file and decodes all of its sections.
fn parse(bytes: Vec<u8>) {
    let len = bytes.len();
    let Ok(snapshot) = Snapshot::parse(Path::new("fuzz"), bytes) else { return };
    assert!(snapshot.sections().iter().map(|s| s.len).sum::<usize>() < len);
    let _ = snapshot.get::<Anything>();
    for section in snapshot.sections() {
        let _ = snapshot.value(&section.name);
    }
    let _ = snapshot.describe().to_string();
}

/// A file with `data` as a section, and with valid checksums, which a fuzzer cannot guess.
fn sealed(data: &[u8]) -> Vec<u8> {
    use crate::format::{Header, SECTION, end, seal};
    let version = data.first().map_or(1, |b| u16::from(b % 4));
    let writer = crate::Writer::new(&Header::new("microvm", "fuzz", 0)).expect("a header can be encoded");
    let mut bytes = writer.finish().expect("an empty file is small");
    // Without the end record, only the header is left.
    bytes.truncate(bytes.len() - 12);
    let mut crcs = bytes[bytes.len() - 4..].to_vec();
    let start = bytes.len();
    bytes.extend_from_slice(&SECTION);
    bytes.extend_from_slice(&8u16.to_le_bytes());
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&(data.len() as u64).to_le_bytes());
    bytes.extend_from_slice(b"anything");
    bytes.extend_from_slice(data);
    seal(&mut bytes, start, &mut crcs);
    end(&mut bytes, 1, &crcs);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

    #[test]
    fn seeded_random_bytes_are_read_or_refused() {
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        let mut runner = TestRunner::new_with_rng(Config { cases: 20_000, ..Config::default() }, rng);
        let bytes = proptest::collection::vec(any::<u8>(), 0..300);
        runner
            .run(&bytes, |data| {
                decode(&data);
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn made_up_files_have_valid_checksums() {
        let file = Snapshot::parse(Path::new("fuzz"), sealed(&[0x02])).unwrap();
        assert_eq!(file.value("anything").unwrap(), Value::from(2));
    }

    #[test]
    fn mutated_data_of_the_right_shape_is_read_or_refused() {
        let good = Anything {
            number: Some(3),
            list: vec![vec![1; 40], vec![]],
            choice: Some(Choice::Struct { map: [("a".into(), -1)].into() }),
            rest: [("more".to_owned(), Value::Array(vec![Value::Null]))].into(),
        };
        let mut data = Vec::new();
        ciborium::into_writer(&good, &mut data).unwrap();
        for at in 0..data.len() {
            for byte in 0..=255 {
                let mut data = data.clone();
                data[at] = byte;
                decode(&data);
            }
            decode(&data[..at]);
        }
    }
}
