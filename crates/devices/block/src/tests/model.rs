//! Random requests, on every kind of disk and with both engines, against a vector of bytes.

use proptest::prelude::*;

use super::rig::*;

/// A size that is no multiple of a map's page.
const SECTORS: u64 = 4096 + 77;

#[derive(Debug, Clone)]
enum Step {
    Read {
        sector: u64,
        count: u64,
        piece: u64,
    },
    Write {
        sector: u64,
        count: u64,
        piece: u64,
        seed: u8,
    },
    Discard {
        sector: u64,
        count: u64,
    },
    Zero {
        sector: u64,
        count: u64,
        unmap: bool,
    },
    Flush,
    /// Waits for all requests.
    Wait,
    /// Closes the disk and opens it again.
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || {
        // Small ones, close together so that they overlap, and some that are split into parts.
        let small = (0..200u64, 1..40u64);
        let large = (0..SECTORS, 1..SECTORS);
        prop_oneof![4 => small, 1 => large].prop_map(|(sector, count)| (sector, count.min(SECTORS - sector)))
    };
    let piece = prop_oneof![Just(u64::MAX), Just(4096), Just(512), Just(100), Just(3333)];
    prop_oneof![
        4 => (range(), piece.clone()).prop_map(|((sector, count), piece)| Step::Read { sector, count, piece }),
        6 => (range(), piece, any::<u8>())
            .prop_map(|((sector, count), piece, seed)| Step::Write { sector, count, piece, seed }),
        2 => range().prop_map(|(sector, count)| Step::Discard { sector, count }),
        2 => (range(), any::<bool>()).prop_map(|((sector, count), unmap)| Step::Zero { sector, count, unmap }),
        1 => Just(Step::Flush),
        2 => Just(Step::Wait),
        1 => Just(Step::Reopen),
    ]
}

/// A read in flight: its token, its buffers, and the expected data.
type PendingRead = (Token, Vec<(u64, usize)>, Vec<u8>);

/// How a disk is served: the engine, the kind of worker, the file system.
#[derive(Debug, Clone, Copy)]
struct How {
    engine: IoEngine,
    blocking: Blocking,
    in_memory: bool,
}

impl How {
    fn any() -> impl Strategy<Value = How> {
        (0..2usize, any::<bool>(), any::<bool>()).prop_map(|(engine, may_wait, in_memory)| How {
            engine: ENGINES[engine],
            blocking: if may_wait { Blocking::Allowed } else { Blocking::Never },
            in_memory,
        })
    }

    fn dir(self) -> tempfile::TempDir {
        if self.in_memory { tempfile::tempdir_in("/dev/shm").unwrap() } else { tempfile::tempdir().unwrap() }
    }
}

/// Runs `steps`. A request that overlaps one in flight waits for it, because their order is
/// undefined.
fn run(options: &DiskOptions, how: How, model: &mut [u8], steps: &[Step]) {
    let mut rig = Rig::open_with(options, how.blocking);
    let mut busy: Vec<(u64, u64)> = Vec::new();
    let mut reads: Vec<PendingRead> = Vec::new();
    for step in steps {
        let range = match *step {
            Step::Read { sector, count, .. }
            | Step::Write { sector, count, .. }
            | Step::Discard { sector, count }
            | Step::Zero { sector, count, .. } => Some((sector, sector + count)),
            _ => None,
        };
        let meets = range.is_some_and(|(from, to)| busy.iter().any(|&(a, b)| from < b && a < to));
        let is_arena_full = rig.next_addr > 4 << 20;
        if meets || is_arena_full || matches!(step, Step::Wait | Step::Reopen) {
            wait_for_all(&mut rig, &mut reads);
            busy.clear();
        }
        busy.extend(range);
        let bytes =
            |sector: u64, count: u64| (sector * SECTOR) as usize..((sector + count) * SECTOR) as usize;
        match *step {
            Step::Read { sector, count, piece } => {
                let (buffers, places) = rig.buffers(count * SECTOR, piece, Access::Write);
                let token = rig.start(sector * SECTOR, Request::Read(buffers));
                reads.push((token, places, model[bytes(sector, count)].to_vec()));
            }
            Step::Write { sector, count, piece, seed } => {
                let data = pattern(seed, sector * SECTOR, count * SECTOR);
                rig.start_write(sector * SECTOR, &data, piece);
                model[bytes(sector, count)].copy_from_slice(&data);
            }
            Step::Discard { sector, count } => {
                rig.start(sector * SECTOR, Request::Discard { len: count * SECTOR });
                model[bytes(sector, count)].fill(0);
            }
            Step::Zero { sector, count, unmap } => {
                rig.start(sector * SECTOR, Request::WriteZeroes { len: count * SECTOR, unmap });
                model[bytes(sector, count)].fill(0);
            }
            Step::Flush => {
                rig.start(0, Request::Flush);
            }
            Step::Wait => {}
            Step::Reopen => {
                drop(rig);
                rig = Rig::open_with(options, how.blocking);
            }
        }
        rig.queue.submit_and_reap();
    }
    wait_for_all(&mut rig, &mut reads);
    for (index, expected) in model.chunks(1 << 20).enumerate() {
        let got = rig.read((index as u64) << 20, expected.len() as u64).unwrap();
        assert!(got == expected, "the disk differs from the model in MiB {index}");
    }
}

fn wait_for_all(rig: &mut Rig, reads: &mut Vec<PendingRead>) {
    for (token, result) in rig.finish() {
        result.unwrap_or_else(|errno| panic!("request {token}: {errno}"));
    }
    for (token, places, expected) in reads.drain(..) {
        assert!(rig.bytes_at(&places) == expected, "read {token} returned something else");
    }
}

fn new_base(dir: &Path) -> (PathBuf, Vec<u8>) {
    let content = pattern(0x55, 0, SECTORS * SECTOR);
    let path = dir.join("base");
    std::fs::write(&path, &content).unwrap();
    (path, content)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn raw_file_agrees_with_the_model(steps in prop::collection::vec(step(), 1..60), how in How::any()) {
        let dir = how.dir();
        let (base, mut model) = new_base(dir.path());
        run(&raw(&base, how.engine), how, &mut model, &steps);
        prop_assert!(std::fs::read(base).unwrap() == model);
    }

    #[test]
    fn overlay_agrees_with_the_model(steps in prop::collection::vec(step(), 1..60), how in How::any()) {
        let dir = how.dir();
        let (base, mut model) = new_base(dir.path());
        let before = model.clone();
        run(&overlaid(&base, dir.path().join("top"), vec![], how.engine), how, &mut model, &steps);
        prop_assert!(std::fs::read(base).unwrap() == before, "the base was written");
    }

    #[test]
    fn stacked_overlays_agree_with_the_model(
        layers in prop::collection::vec(prop::collection::vec(step(), 1..30), 3),
        how in How::any(),
    ) {
        let dir = how.dir();
        let (base, mut model) = new_base(dir.path());
        let mut below = Vec::new();
        for (index, steps) in layers.iter().enumerate() {
            let top = dir.path().join(format!("layer{index}"));
            run(&overlaid(&base, top.clone(), below.clone(), how.engine), how, &mut model, steps);
            below.push(top);
        }
        let top = below.pop().unwrap();
        let all = DiskOptions { read_only: true, ..overlaid(&base, top, below, how.engine) };
        run(&all, how, &mut model, &[]);
    }

    #[test]
    fn unsafe_overlay_agrees_with_the_model(
        steps in prop::collection::vec(step(), 1..60),
        how in How::any(),
    ) {
        let dir = how.dir();
        let (base, mut model) = new_base(dir.path());
        let options = overlaid(&base, dir.path().join("top"), vec![], how.engine);
        run(&DiskOptions { cache_type: CacheType::Unsafe, ..options }, how, &mut model, &steps);
    }
}

/// What the base does not have reads as zeros.
#[test]
fn overlay_can_be_larger_than_its_base() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (base, content) = new_base(dir.path());
        let mut options = overlaid(&base, dir.path().join("top"), vec![], engine);
        options.overlay.as_mut().unwrap().size_mib = Some(8);
        let mut rig = Rig::open(&options);
        assert_eq!(rig.disk.size(), 8 << 20);
        let end = content.len() as u64;
        let mut expected = content[content.len() - 512..].to_vec();
        expected.extend([0; 1024]);
        assert_eq!(rig.read(end - 512, 1536).unwrap(), expected);
        rig.write(end + 512, &[7; 512]).unwrap();
        drop(rig);
        let mut rig = Rig::open(&options);
        assert_eq!(rig.read(end, 1536).unwrap(), [[0u8; 512], [7; 512], [0; 512]].concat());
    }
}

/// More requests at once than the ring has entries, all on the same few sectors.
#[test]
fn more_requests_than_ring_entries_all_complete() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (base, content) = new_base(dir.path());
        let mut rig = Rig::open(&overlaid(&base, dir.path().join("top"), vec![], engine));
        for round in 0..1000u64 {
            rig.start_write((round % 7) * SECTOR, &[(round % 7) as u8; 1024], 512);
        }
        let results = rig.finish();
        assert_eq!(results.len(), 1000);
        assert!(results.iter().all(|(_, result)| result.is_ok()));
        // Each sector has one of the two patterns that were written to it.
        let got = rig.read(0, 9 * SECTOR).unwrap();
        for (index, sector) in got.chunks(512).enumerate().take(8) {
            assert!(sector.iter().all(|&byte| byte == sector[0]));
            assert!([index as u8, (index as u8).wrapping_sub(1)].contains(&sector[0]), "sector {index}");
        }
        assert_eq!(got[8 * 512..], content[8 * 512..9 * 512]);
    }
}
