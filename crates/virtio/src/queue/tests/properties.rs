//! Properties of the queue: against a model of the specification and an oracle, `virtio-queue`.

use super::*;

/// A descriptor as the specification has it.
#[derive(Debug, Clone, Copy)]
struct Entry {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

type Buffer = (u64, u32);

/// What chain a table describes, by the letter of 2.7.5; None if it breaks a rule.
fn model(
    table: &[Entry],
    head: u16,
    indirect: &dyn Fn(u64, u32) -> Option<Vec<Entry>>,
) -> Option<(Vec<Buffer>, Vec<Buffer>)> {
    // The chain as a list of descriptors, each table followed without going anywhere twice.
    let follow = |table: &[Entry], head: u16| -> Option<Vec<Entry>> {
        let (mut list, mut visited) = (Vec::new(), vec![false; table.len()]);
        let mut at = usize::from(head);
        loop {
            if std::mem::replace(visited.get_mut(at)?, true) {
                return None;
            }
            list.push(table[at]);
            // An indirect table ends the chain of descriptors that leads to it.
            if table[at].flags & NEXT == 0 || table[at].flags & INDIRECT != 0 {
                return Some(list);
            }
            at = table[at].next.into();
        }
    };
    let mut chain = follow(table, head)?;
    if let Some(last) = chain.last().copied().filter(|last| last.flags & INDIRECT != 0) {
        if last.flags & NEXT != 0 || last.len == 0 || last.len % 16 != 0 {
            return None;
        }
        let inner = follow(&indirect(last.addr, last.len)?, 0)?;
        if inner.iter().any(|entry| entry.flags & INDIRECT != 0) {
            return None;
        }
        chain.pop();
        chain.extend(inner);
    }
    let total: u64 = chain.iter().map(|entry| u64::from(entry.len)).sum();
    let split = chain.iter().position(|entry| entry.flags & WRITE != 0).unwrap_or(chain.len());
    let in_ram = |entry: &Entry| entry.len == 0 || entry.addr.checked_add(entry.len.into()) <= Some(RAM_END);
    let in_ram = |entry: &Entry| in_ram(entry) && (entry.len == 0 || entry.addr < RAM_END);
    if total > u32::MAX.into()
        || chain[split..].iter().any(|entry| entry.flags & WRITE == 0)
        || !chain.iter().all(in_ram)
    {
        return None;
    }
    let list =
        |entries: &[Entry]| entries.iter().filter(|e| e.len > 0).map(|e| (e.addr, e.len)).collect::<Vec<_>>();
    Some((list(&chain[..split]), list(&chain[split..])))
}

fn entry(table_len: u16) -> impl Strategy<Value = Entry> {
    let addr = prop_oneof![
        6 => (0u64..64).prop_map(|i| DATA + i * 512),
        3 => (0u64..4).prop_map(|i| TABLES + i * 64),
        1 => Just(RAM_END - 16),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => Just(16u32), 4 => Just(64), 2 => Just(512), 1 => Just(0), 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(NEXT), 3 => Just(NEXT | WRITE), 2 => Just(WRITE), 2 => Just(INDIRECT), 2 => 0u16..8];
    (addr, len, flags, 0..table_len + 1).prop_map(|(addr, len, flags, next)| Entry { addr, len, flags, next })
}

fn write_table(ram: &GuestRam, at: u64, table: &[Entry]) {
    for (at, e) in (at..).step_by(16).zip(table) {
        write_descriptor(ram, at, e.addr, e.len, e.flags, e.next);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is in the descriptors: what the specification allows is popped as it says, anything
    /// else is an error.
    #[test]
    fn any_table_gives_what_the_specification_says(
        table in prop::collection::vec(entry(8), 8),
        tables in prop::collection::vec(entry(4), 16),
        head in 0u16..8,
    ) {
        let (ram, driver, mut queue) = pair_in(reused_ram(RAM_MIB), 8, BOTH);
        write_table(&ram, driver.state().desc_table, &table);
        write_table(&ram, TABLES, &tables);
        let indirect = |addr: u64, len: u32| -> Option<Vec<Entry>> {
            ram.contains(addr, len.into()).then(|| {
                (0..u64::from(len / 16)).map(|i| {
                    let words: [u64; 2] = std::array::from_fn(|w| {
                        ram.memory().read_obj(GuestAddress(addr + 16 * i + 8 * w as u64)).unwrap()
                    });
                    let (addr, len) = (words[0], words[1] as u32);
                    Entry { addr, len, flags: (words[1] >> 32) as u16, next: (words[1] >> 48) as u16 }
                }).collect()
            })
        };
        let want = model(&table, head, &indirect);
        driver.set_avail_entry(0, head);
        driver.set_avail_idx(1);
        let got = pop(&mut queue).ok().map(|chain| {
            let chain = chain.expect("one is available");
            (buffers(chain.readable()), buffers(chain.writable()))
        });
        prop_assert_eq!(&got, &want);

        // What is allowed is what rust-vmm's queue finds, too.
        if let Some((readable, writable)) = want {
            let state = driver.state();
            let mut oracle = OracleQueue::new(8).unwrap();
            oracle.try_set_desc_table_address(GuestAddress(state.desc_table)).unwrap();
            oracle.try_set_avail_ring_address(GuestAddress(state.avail_ring)).unwrap();
            oracle.try_set_used_ring_address(GuestAddress(state.used_ring)).unwrap();
            oracle.set_ready(true);
            let chain = oracle.iter(ram.memory()).unwrap().next().unwrap();
            let list: Vec<Buffer> =
                chain.filter(|d| d.len() > 0).map(|d| (d.addr().0, d.len())).collect();
            prop_assert_eq!(list, [readable, writable].concat());
        }
    }

    /// With any bytes in the rings, `pop` returns an error or a chain and does not panic, and no
    /// more chains are in flight than the queue has descriptors.
    #[test]
    fn garbage_in_the_rings_kills_only_the_queue(
        garbage in prop::collection::vec(any::<u8>(), 300),
        size in prop_oneof![Just(1u16), Just(4), Just(8)],
        features in prop_oneof![Just(0), Just(BOTH)],
        idx: u16,
    ) {
        let (ram, driver, mut queue) = pair_in(reused_ram(RAM_MIB), size, features);
        ram.memory().write_slice(&garbage, GuestAddress(BASE)).unwrap();
        driver.set_avail_idx(idx % (size + 2));
        let mut popped = 0;
        while let Ok(Some(_)) = pop(&mut queue) {
            popped += 1;
            prop_assert!(popped <= size && queue.in_flight() == popped);
        }
        let _ = (queue.enable_notifications(), queue.publish());
    }
}

/// What driver and device do in turn.
#[derive(Debug, Clone)]
enum Step {
    /// The driver adds a chain with so many readable and writable buffers.
    Add { readable: usize, writable: usize, indirect: bool },
    /// The driver shows what it added.
    Publish,
    /// The driver takes all used chains, then asks for an interrupt.
    Reap,
    /// The device works until it sleeps, if it is awake; it completes at once or later.
    Work { hold: bool },
    /// The device completes one of what it held, by number.
    Complete(usize),
    /// Device and driver are saved and made again.
    Save,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..4, 0usize..4, any::<bool>())
            .prop_map(|(readable, writable, indirect)| Step::Add { readable, writable, indirect }),
        3 => Just(Step::Publish),
        2 => Just(Step::Reap),
        3 => any::<bool>().prop_map(|hold| Step::Work { hold }),
        3 => (0usize..8).prop_map(Step::Complete),
        1 => Just(Step::Save),
    ]
}

/// A chain that the driver gave away: its head, and its buffers.
type Given = (u16, Vec<Buffer>, Vec<Buffer>);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// With a correct driver and a device that polls at any time, chains arrive whole and in order,
    /// each comes back with its length, and a side that sleeps is woken.
    #[test]
    fn each_chain_comes_back_once_with_its_buffers(
        size in prop_oneof![Just(1u16), Just(2), Just(8), Just(64)],
        event_idx: bool,
        start in prop_oneof![Just(0u16), Just(0xfffe)],
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let features = feature::RING_INDIRECT_DESC | if event_idx { feature::RING_EVENT_IDX } else { 0 };
        let ram = reused_ram(RAM_MIB);
        let mut driver = DriverQueue::starting_at(&ram, BASE, size, features, start);
        let progress = Arc::<QueueProgress>::default();
        let new = |progress: &Arc<QueueProgress>, state: &QueueState| {
            Queue::new(0, MAX_QUEUE_SIZE, state, features, &ram, Arc::clone(progress)).unwrap()
        };
        let mut queue = new(&progress, &driver.state());
        let mut given: VecDeque<Given> = VecDeque::new();
        let mut visible = 0;
        let mut held: Vec<(u16, u32)> = Vec::new();
        let mut published: VecDeque<(u16, u32)> = VecDeque::new();
        let (mut awake, mut driver_awake, mut chain) = (true, true, Chain::new());
        let mut tables = 0;

        for step in steps {
            match step {
                Step::Add { readable, writable, indirect } => {
                    let list = |from: u64, n: usize| -> Vec<Buffer> {
                        (0..n as u64).map(|i| (DATA + from + 0x100 * i, 1 + i as u32)).collect()
                    };
                    let (r, w) = (list(0, readable), list(0x10_0000, writable));
                    let head = if indirect && readable + writable > 0 {
                        tables = (tables + 1) % 64;
                        driver.add_indirect(TABLES + 0x100 * tables, &r, &w)
                    } else {
                        driver.add(&r, &w)
                    };
                    if let Some(head) = head {
                        given.push_back((head, r, w));
                    }
                }
                Step::Publish => {
                    let new = given.len() > visible;
                    visible = given.len();
                    let kick = driver.publish();
                    if !awake && new {
                        prop_assert!(kick, "the device sleeps");
                    }
                    awake |= kick;
                }
                Step::Reap => {
                    while let Some(used) = driver.take_used() {
                        prop_assert_eq!(Some((used.head, used.written)), published.pop_front());
                    }
                    prop_assert!(published.is_empty());
                    prop_assert!(!driver.enable_interrupts());
                    driver_awake = false;
                }
                Step::Work { hold } if awake => loop {
                    queue.disable_notifications().unwrap();
                    while queue.pop(&mut chain).unwrap() {
                        let (head, r, w) = given.pop_front().expect("only what was given");
                        visible -= 1;
                        prop_assert_eq!(chain.head(), head);
                        prop_assert_eq!((buffers(chain.readable()), buffers(chain.writable())), (r, w));
                        held.push((head, chain.writable().len()));
                    }
                    prop_assert_eq!(visible, 0);
                    if !hold {
                        for (head, written) in held.drain(..) {
                            queue.add_used(head, written).unwrap();
                            published.push_back((head, written));
                        }
                    }
                    let interrupt = queue.publish().unwrap();
                    if !driver_awake && !published.is_empty() {
                        prop_assert!(interrupt, "the driver sleeps");
                        driver_awake = true;
                    }
                    if !queue.enable_notifications().unwrap() {
                        awake = false;
                        break;
                    }
                },
                Step::Complete(which) if !held.is_empty() => {
                    let (head, written) = held.remove(which % held.len());
                    queue.add_used(head, written).unwrap();
                    published.push_back((head, written));
                    let interrupt = queue.publish().unwrap();
                    if !driver_awake {
                        prop_assert!(interrupt, "the driver sleeps");
                        driver_awake = true;
                    }
                }
                Step::Save if held.is_empty() => {
                    let (next_avail, next_used) = progress.get();
                    queue = new(&progress, &QueueState { next_avail, next_used, ..driver.state() });
                    // As after a restore: every queue is polled, and the driver is interrupted.
                    (awake, driver_awake) = (true, true);
                }
                _ => {}
            }
            prop_assert_eq!(usize::from(queue.in_flight()), held.len());
        }
    }
}
