//! Completions: the used length covers only bytes that were written, and a change is durable if the
//! driver does not flush.

use proptest::prelude::*;

use super::guest::*;
use super::recorder::{FileOp, OpLog, RecordingEngine};
use super::rig::*;
use crate::backend_slot::BackendHandle;
use sync::locked;
use virtio::rate_limiter::RateLimiterConfig;

const SECTORS: u64 = 64;
/// Fills device-writable buffers before a request. No disk here has this byte, and it is no status.
const UNWRITTEN: u8 = 0xee;

/// A disk without [`UNWRITTEN`] bytes.
fn plain_disk(dir: &Path, engine: IoEngine) -> DiskOptions {
    let (options, content) = disk(dir, SECTORS, engine);
    std::fs::write(&options.path, content.into_iter().map(|byte| byte % UNWRITTEN).collect::<Vec<_>>())
        .unwrap();
    options
}

#[derive(Debug, Clone)]
struct Submission {
    kind: u32,
    sector: u64,
    data: Vec<u8>,
    read_len: u32,
    cuts: Vec<u32>,
    indirect: bool,
}

fn submission() -> impl Strategy<Value = Submission> {
    let kind = prop_oneof![
        4 => Just(IN),
        2 => Just(OUT),
        1 => Just(FLUSH),
        2 => Just(GET_ID),
        1 => Just(DISCARD),
        1 => Just(WRITE_ZEROES),
        1 => 14..20u32,
    ];
    let range = (0..SECTORS + 4, 0..4u32, 0..3u32).prop_map(|one| ranges(&[one]));
    let data = prop_oneof![
        2 => Just(vec![]),
        2 => (0..4usize).prop_map(|sectors| vec![7; sectors * 512]),
        2 => range,
        1 => prop::collection::vec(0..UNWRITTEN, 0..600),
    ];
    let read_len = prop_oneof![
        2 => Just(0),
        3 => (1..5u32).prop_map(|sectors| sectors * 512),
        1 => Just(20),
        1 => 0..40u32,
        1 => 0..3000u32,
    ];
    let cuts = prop_oneof![Just(vec![u32::MAX]), prop::collection::vec(1..700u32, 1..6)];
    (kind, 0..SECTORS + 4, data, read_len, cuts, any::<bool>()).prop_map(
        |(kind, sector, data, read_len, cuts, indirect)| Submission {
            kind,
            sector,
            data,
            read_len,
            cuts,
            indirect,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn used_length_covers_only_written_bytes(
        submissions in prop::collection::vec(submission(), 1..40),
        read_only: bool,
        shrunk: bool,
        engine in 0..2usize,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let options = plain_disk(dir.path(), ENGINES[engine]);
        let mut guest = Guest::new(&DiskOptions { read_only, ..options.clone() });
        if shrunk {
            // Reads and writes of the upper half fail, or fill only part of their buffers.
            std::fs::File::options().write(true).open(&options.path).unwrap().set_len(SECTORS * 256).unwrap();
        }
        for Submission { kind, sector, data, read_len, cuts, indirect } in &submissions {
            guest.forget();
            let submitted = guest.submit_cut(0, (*kind, *sector), data, *read_len, cuts, *indirect);
            // The queue has too few free descriptors.
            let Some(submitted) = submitted else { continue };
            guest.kick(0);
            let used = guest.wait(0, 1)[0];
            let response = guest.response(&submitted, used);
            let filled = response.data.iter().take_while(|&&byte| byte != UNWRITTEN).count() as u32;
            let written = if filled == *read_len { filled + 1 } else { filled };
            prop_assert!(
                response.written <= written,
                "kind {kind}, status {}: {} bytes claimed, {written} written", response.status, response.written
            );
            // What was written is in the used length, too.
            match (*kind, response.status) {
                (IN, 0) => prop_assert_eq!(response.written, read_len + 1),
                (GET_ID, 0) => prop_assert_eq!(response.written, if *read_len == 20 { 21 } else { 20 }),
                _ if *read_len == 0 => prop_assert_eq!(response.written, 1),
                _ => {}
            }
        }
    }
}

/// The status is the only byte that is written, and it is not the first.
#[test]
fn failed_write_with_writable_data_claims_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(&plain_disk(dir.path(), IoEngine::Async));
    let response = guest.one(OUT, 0, &[], 512);
    assert_eq!((response.status, response.written), (1, 0));
}

/// A guest whose disk is served by a [`RecordingEngine`], and its log.
fn recorded(options: &DiskOptions, accepts: u64) -> (Guest, OpLog) {
    let guest = Guest::with(options, config(1, 1), RateLimiterConfig::default(), Blocking::Never, accepts);
    let disk = guest.control.disk();
    let log = OpLog::default();
    let engine = Box::new(RecordingEngine::new(disk.files(), log.clone()));
    let part = BackendHandle { queue: disk.queue_with(engine), size: disk.size() };
    drop(guest.control.slots[0].post(part));
    (guest, log)
}

/// Whether the file was changed since its last sync.
fn is_volatile(log: &OpLog) -> bool {
    matches!(locked(log).last(), Some(FileOp::Write { .. }))
}

#[test]
fn changes_are_durable_if_the_driver_cannot_flush() {
    const NO_FLUSH: u64 = !(1 << 9);
    let three = ranges(&[(1, 2, 0), (9, 1, 0), (63, 1, 0)]);
    let unmapped = ranges(&[(1, 2, 1), (9, 1, 1), (63, 1, 1)]);
    for (kind, data) in
        [(OUT, vec![1; 1024]), (DISCARD, three.clone()), (WRITE_ZEROES, three), (WRITE_ZEROES, unmapped)]
    {
        for with_overlay in [false, true] {
            for (accepts, durable) in [(NO_FLUSH, true), (u64::MAX, false)] {
                let dir = tempfile::tempdir().unwrap();
                let plain = plain_disk(dir.path(), IoEngine::Sync);
                let options = if with_overlay {
                    overlaid(&plain.path, dir.path().join("top"), vec![], IoEngine::Sync)
                } else {
                    plain
                };
                let (mut guest, log) = recorded(&options, accepts);
                for _ in 0..2 {
                    assert_eq!(guest.one(kind, 0, &data, 0).status, 0);
                    assert!(!locked(&log).is_empty());
                    assert_eq!(is_volatile(&log), !durable, "kind {kind}, overlay {with_overlay}");
                }
                assert_eq!(guest.control.stats().flush_count.get(), 0);
            }
        }
    }
}
