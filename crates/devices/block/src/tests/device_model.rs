//! Random requests in random buffers on several queues, with pauses, resets and disk swaps in
//! between, against a vector of bytes.

use proptest::prelude::*;

use super::guest::*;
use super::rig::*;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};

const SECTORS: u64 = 3000;

#[derive(Debug, Clone)]
enum Step {
    Submit {
        queue: usize,
        what: What,
        cuts: Vec<u32>,
        indirect: bool,
    },
    Wait,
    Pause,
    Reset,
    /// Swaps the disk for a copy.
    Replace,
}

#[derive(Debug, Clone)]
enum What {
    Read { sector: u64, count: u64 },
    Write { sector: u64, count: u64, seed: u8 },
    Erase { kind: u32, ranges: Vec<(u64, u32)>, unmap: bool },
    Flush,
    GetId,
    Unknown(u32),
}

fn what() -> impl Strategy<Value = What> {
    // Mostly close together; some large, some past the end.
    let range = || prop_oneof![6 => (0..64u64, 1..20u64), 1 => (0..SECTORS, 1..300u64), 1 => (SECTORS - 20..SECTORS + 20, 1..20u64)];
    let ranges = prop::collection::vec(range().prop_map(|(sector, count)| (sector, count as u32)), 1..5);
    let kind = prop_oneof![Just(DISCARD), Just(WRITE_ZEROES)];
    prop_oneof![
        4 => range().prop_map(|(sector, count)| What::Read { sector, count }),
        6 => (range(), any::<u8>()).prop_map(|((sector, count), seed)| What::Write { sector, count, seed }),
        2 => (kind, ranges, any::<bool>()).prop_map(|(kind, ranges, unmap)| What::Erase { kind, ranges, unmap }),
        1 => Just(What::Flush),
        1 => Just(What::GetId),
        1 => (14..20u32).prop_map(What::Unknown),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let cuts = prop_oneof![
        4 => Just(vec![u32::MAX]),
        1 => Just(vec![16, 4096]),
        1 => prop::collection::vec(1..5000u32, 1..6),
    ];
    let submit = (0..3usize, what(), cuts, any::<bool>());
    prop_oneof![
        20 => submit.prop_map(|(queue, what, cuts, indirect)| Step::Submit { queue, what, cuts, indirect }),
        2 => Just(Step::Wait),
        1 => Just(Step::Pause),
        1 => Just(Step::Reset),
        1 => Just(Step::Replace),
    ]
}

/// The expected result of a request.
struct Expected {
    submitted: Submitted,
    queue: usize,
    status: u8,
    /// `None`: not checked.
    data: Option<Vec<u8>>,
}

struct Model {
    guest: Guest,
    disk: Vec<u8>,
    expected: Vec<Expected>,
    busy: Vec<(u64, u64)>,
}

impl Model {
    /// Waits for all completions, and checks them.
    fn wait_for_all(&mut self) {
        let guest = &mut self.guest;
        for queue in 0..guest.drivers.len() {
            guest.kick(queue);
        }
        let mut used = Vec::new();
        for queue in 0..guest.drivers.len() {
            let count = self.expected.iter().filter(|expected| expected.queue == queue).count();
            used.push(guest.wait_in_time(queue, count));
        }
        for Expected { submitted, queue, status, data } in self.expected.drain(..) {
            let used = used[queue].iter().find(|used| used.head == submitted.head).unwrap();
            let response = guest.response(&submitted, *used);
            assert_eq!(response.status, status);
            assert!(data.is_none_or(|data| data == response.data), "a request returned something else");
        }
        self.busy.clear();
        guest.forget();
    }

    fn submit(&mut self, queue: usize, what: &What, cuts: &[u32], indirect: bool) {
        let ranges_of = match what {
            What::Read { sector, count } | What::Write { sector, count, .. } => vec![(*sector, *count)],
            What::Erase { ranges, .. } => ranges.iter().map(|&(s, c)| (s, c.into())).collect(),
            _ => vec![],
        };
        let on_disk = ranges_of.iter().all(|&(sector, count)| sector + count <= SECTORS);
        let meets = |&(sector, count): &(u64, u64)| {
            self.busy.iter().any(|&(from, to)| sector < to && from < sector + count)
        };
        if ranges_of.iter().any(meets) || self.guest.arena_used() > 8 << 20 {
            self.wait_for_all();
        }
        let place = |sector: u64, count: u64| (sector * 512) as usize..((sector + count) * 512) as usize;
        let status = u8::from(!on_disk);
        let (header, data, read_len, status, expected) = match what {
            What::Read { sector, count } => {
                let data = on_disk.then(|| self.disk[place(*sector, *count)].to_vec());
                ((IN, *sector), vec![], (*count * 512) as u32, status, data)
            }
            What::Write { sector, count, seed } => {
                ((OUT, *sector), pattern(*seed, sector * 512, count * 512), 0, status, None)
            }
            What::Erase { kind, ranges: list, unmap } => {
                let flags = u32::from(*unmap && *kind == WRITE_ZEROES);
                let list: Vec<_> = list.iter().map(|&(sector, count)| (sector, count, flags)).collect();
                ((*kind, 0), ranges(&list), 0, status, None)
            }
            What::Flush => ((FLUSH, 0), vec![], 0, 0, None),
            What::GetId => ((GET_ID, 0), vec![], 20, 0, Some([&b"disk_1"[..], &[0; 14]].concat())),
            What::Unknown(kind) => ((*kind, 0), vec![], 7, 2, Some(vec![0xee; 7])),
        };
        let submitted = self.guest.submit_cut(queue, header, &data, read_len, cuts, indirect);
        // The queue had too few free descriptors, so nothing was added.
        let Some(submitted) = submitted else { return };
        if on_disk {
            match what {
                What::Write { sector, count, .. } => self.disk[place(*sector, *count)].copy_from_slice(&data),
                What::Erase { ranges, .. } => {
                    for &(sector, count) in ranges {
                        self.disk[place(sector, count.into())].fill(0);
                    }
                }
                _ => {}
            }
            self.busy.extend(ranges_of.iter().map(|&(sector, count)| (sector, sector + count)));
        }
        self.expected.push(Expected { submitted, queue, status, data: expected });
        self.guest.kick(queue);
    }
}

fn run(steps: &[Step], queues: u16, blocking: Blocking, with_overlay: bool, engine: IoEngine, limited: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (plain, content) = disk(dir.path(), SECTORS, engine);
    let options = if with_overlay {
        overlaid(&plain.path, dir.path().join("top"), vec![], engine)
    } else {
        plain.clone()
    };
    let bandwidth = BucketConfig { size: 64 << 10, refill_time_ms: 1, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: limited.then_some(bandwidth), ops: None };
    let threads = if with_overlay { 1 } else { queues.min(2) };
    let guest = Guest::with(&options, config(queues, threads), limits, blocking, u64::MAX);
    let mut model = Model { guest, disk: content, expected: vec![], busy: vec![] };
    for (index, step) in steps.iter().enumerate() {
        match step {
            Step::Submit { queue, what, cuts, indirect } => {
                model.submit(queue % usize::from(queues), what, cuts, *indirect);
                model.guest.worker.run();
            }
            Step::Wait => model.wait_for_all(),
            Step::Pause => {
                let paused = model.guest.worker.pause();
                model.guest.worker.run_until(|| paused.try_recv().is_ok());
                model.guest.worker.resume();
            }
            Step::Reset => {
                model.wait_for_all();
                let tasks = model.guest.begin_reset();
                model.guest.end_reset(tasks);
                model.guest.activate();
            }
            Step::Replace => {
                model.wait_for_all();
                let path = dir.path().join(format!("disk{index}"));
                std::fs::write(&path, &model.disk).unwrap();
                let new = Disk::open(&DiskOptions { path, ..plain.clone() }).unwrap();
                // A disk without an overlay, also after one with an overlay.
                let mut replaced = model.guest.control.replace(new).unwrap();
                model.guest.worker.run_until(|| replaced.wait(std::time::Duration::ZERO).is_ok());
            }
        }
    }
    model.wait_for_all();
    for from in (0..SECTORS).step_by(500) {
        let (status, data) = model.guest.read_in_time(from, 500);
        assert_eq!(status, 0);
        assert!(data == model.disk[(from * 512) as usize..((from + 500) * 512) as usize], "sector {from} on");
    }
    assert_eq!(model.guest.interrupt.broken(), Vec::<String>::new());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_agree_with_the_model(
        steps in prop::collection::vec(step(), 1..60),
        queues in 1..4u16,
        may_wait: bool,
        with_overlay: bool,
        engine in 0..2usize,
        limited: bool,
    ) {
        let blocking = if may_wait { Blocking::Allowed } else { Blocking::Never };
        run(&steps, queues, blocking, with_overlay, ENGINES[engine], limited);
    }
}
