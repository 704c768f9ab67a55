//! The queue against a driver that behaves, one that does not, and an oracle.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue as OracleQueue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{
    DriverQueue, INDIRECT, NEXT, WRITE, guest_ram, reused_ram, tracked_guest_ram, write_descriptor,
};
use sync::EventFd;

const BASE: u64 = 0x1000;
const DATA: u64 = 0x10_0000;
const TABLES: u64 = 0x8_0000;
const RAM_MIB: u32 = 4;
const RAM_END: u64 = (RAM_MIB as u64) << 20;
const BOTH: u64 = feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;

fn queue(ram: &GuestRam, driver: &DriverQueue, features: u64) -> Queue {
    Queue::new(0, MAX_QUEUE_SIZE, &driver.state(), features, ram, Arc::default()).unwrap()
}

fn pair(size: u16, features: u64) -> (GuestRam, DriverQueue, Queue) {
    pair_in(guest_ram(RAM_MIB), size, features)
}

fn pair_in(ram: GuestRam, size: u16, features: u64) -> (GuestRam, DriverQueue, Queue) {
    let driver = DriverQueue::new(&ram, BASE, size, features);
    let queue = queue(&ram, &driver, features);
    (ram, driver, queue)
}

fn buffers(buffers: Buffers<'_>) -> Vec<(u64, u32)> {
    buffers.iter().map(|buffer| (buffer.addr, buffer.len)).collect()
}

fn pop(queue: &mut Queue) -> Result<Option<Chain>, QueueError> {
    let mut chain = Chain::new();
    Ok(queue.pop(&mut chain)?.then_some(chain))
}

/// Makes descriptor 0 available, whatever it is.
fn pop_first(driver: &DriverQueue, queue: &mut Queue) -> Result<Option<Chain>, QueueError> {
    driver.set_avail_entry(0, 0);
    driver.set_avail_idx(1);
    pop(queue)
}

#[test]
fn a_chain_gives_its_buffers_in_order_and_comes_back_used() {
    let (_ram, mut driver, mut queue) = pair(8, 0);
    assert!(pop(&mut queue).unwrap().is_none());
    let head = driver.add(&[(DATA, 16), (DATA + 0x1000, 512)], &[(DATA + 0x2000, 1)]).unwrap();
    assert!(driver.publish());
    let chain = pop(&mut queue).unwrap().unwrap();
    assert_eq!(chain.head(), head);
    assert_eq!(buffers(chain.readable()), [(DATA, 16), (DATA + 0x1000, 512)]);
    assert_eq!(buffers(chain.writable()), [(DATA + 0x2000, 1)]);
    assert_eq!((queue.in_flight(), chain.readable().len()), (1, 528));
    queue.add_used(head, 1).unwrap();
    assert_eq!(driver.take_used(), None, "nothing is visible before it is published");
    assert!(queue.publish().unwrap());
    assert_eq!(driver.take_used(), Some(crate::testing::Used { head, written: 1 }));
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn sizes_and_places_of_rings_are_checked() {
    let ram = guest_ram(RAM_MIB);
    let good = DriverQueue::new(&ram, BASE, 16, 0).state();
    let new = |state: QueueState| Queue::new(0, 256, &state, 0, &ram, Arc::default()).map(|_| ());
    assert_eq!(new(good), Ok(()));
    for size in [0, 3, 255, 512, 1024, 0x8000, 0xffff] {
        assert_eq!(new(QueueState { size, ..good }), Err(QueueError::Size { size, max: 256 }));
    }
    for (state, area) in [
        (QueueState { desc_table: BASE + 8, ..good }, "descriptor table"),
        (QueueState { avail_ring: BASE + 1, ..good }, "available ring"),
        (QueueState { used_ring: BASE + 2, ..good }, "used ring"),
    ] {
        assert!(matches!(new(state), Err(QueueError::Unaligned { area: p, .. }) if p == area));
    }
    for addr in [RAM_END - 16, RAM_END, 0xffff_ffff_ffff_fff0] {
        for (state, area) in [
            (QueueState { desc_table: addr, ..good }, "descriptor table"),
            (QueueState { avail_ring: addr, ..good }, "available ring"),
            (QueueState { used_ring: addr, ..good }, "used ring"),
        ] {
            assert!(matches!(new(state), Err(QueueError::RingOutsideRam { area: p, .. }) if p == area));
        }
    }
    // To the last byte.
    let last = QueueState { used_ring: (RAM_END - (6 + 8 * 16)) & !3, ..good };
    assert_eq!(new(last), Ok(()));
    assert!(new(QueueState { used_ring: last.used_ring + 4, ..good }).is_err());
}

#[test]
fn an_available_index_that_jumps_too_far_kills_the_queue() {
    let (_ram, driver, mut queue) = pair(8, 0);
    driver.set_avail_idx(9);
    let error = QueueError::AvailableIndex { from: 0, to: 9, size: 8 };
    assert_eq!(pop(&mut queue).unwrap_err(), error);
    driver.set_avail_idx(0);
    assert_eq!(pop(&mut queue).unwrap_err(), error, "it stays dead");
    assert_eq!(queue.enable_notifications(), Err(error));
    assert_eq!(queue.publish(), Err(error));
    assert_eq!(queue.add_used(0, 0), Err(error));
}

#[test]
fn a_device_that_leaves_chains_where_they_are_is_kicked_for_the_next_one() {
    for features in [0, feature::RING_EVENT_IDX] {
        let (_ram, mut driver, mut queue) = pair(8, features);
        for _ in 0..2 {
            driver.add(&[(DATA, 1)], &[]).unwrap();
        }
        driver.publish();
        queue.disable_notifications().unwrap();
        assert_eq!(queue.available(), Ok(2));
        assert_eq!(queue.enable_notifications_of_more(), Ok(false));
        driver.add(&[(DATA, 1)], &[]).unwrap();
        assert!(driver.publish(), "the third is kicked for");
        assert_eq!((queue.available(), queue.in_flight()), (Ok(3), 0));
    }
}

#[test]
fn chains_in_flight_count_against_the_queue() {
    let (_ram, mut driver, mut queue) = pair(4, 0);
    for _ in 0..4 {
        driver.add(&[(DATA, 1)], &[]).unwrap();
    }
    driver.publish();
    for _ in 0..4 {
        pop(&mut queue).unwrap().unwrap();
    }
    driver.set_avail_idx(5);
    assert_eq!(pop(&mut queue).unwrap_err(), QueueError::AvailableIndex { from: 4, to: 5, size: 4 });
}

#[test]
fn a_chain_that_is_made_available_twice_is_refused() {
    let (_ram, driver, mut queue) = pair(4, 0);
    driver.set_descriptor(2, DATA, 1, 0, 0);
    driver.set_avail_entry(0, 2);
    driver.set_avail_entry(1, 2);
    driver.set_avail_idx(2);
    pop(&mut queue).unwrap().unwrap();
    assert_eq!(pop(&mut queue).unwrap_err(), QueueError::InFlight(2));
}

#[test]
fn heads_and_links_outside_the_table_are_refused() {
    let (_ram, driver, mut queue) = pair(4, 0);
    driver.set_avail_entry(0, 4);
    driver.set_avail_idx(1);
    assert_eq!(pop(&mut queue).unwrap_err(), QueueError::DescriptorIndex { index: 4, len: 4 });
    let (_ram, driver, mut queue) = pair(4, 0);
    driver.set_descriptor(0, DATA, 1, NEXT, 0xffff);
    let error = QueueError::DescriptorIndex { index: 0xffff, len: 4 };
    assert_eq!(pop_first(&driver, &mut queue).unwrap_err(), error);
}

#[test]
fn a_chain_in_a_circle_is_refused() {
    for size in [1, 4, 1024] {
        let (_ram, driver, mut queue) = pair(size, 0);
        for i in 0..size {
            driver.set_descriptor(i, DATA, 1, NEXT, (i + 1) % size);
        }
        assert_eq!(pop_first(&driver, &mut queue).unwrap_err(), QueueError::ChainTooLong);
    }
}

#[test]
fn the_longest_chain_passes_and_one_more_does_not() {
    let ram = guest_ram(RAM_MIB);
    for (len, want) in [(1024, true), (1025, false)] {
        let driver = DriverQueue::new(&ram, BASE, 16, BOTH);
        let mut queue = queue(&ram, &driver, BOTH);
        for i in 0..len {
            let (flags, next) = if i + 1 < len { (NEXT, i + 1) } else { (0, 0) };
            write_descriptor(&ram, TABLES + 16 * u64::from(i), DATA, 1, flags, next);
        }
        driver.set_descriptor(0, TABLES, 16 * u32::from(len), INDIRECT, 0);
        match pop_first(&driver, &mut queue) {
            Ok(chain) => assert!(want && chain.unwrap().readable().len() == 1024),
            Err(error) => assert!(!want && error == QueueError::ChainTooLong),
        }
    }
}

#[test]
fn a_chain_of_four_gibibytes_is_refused_and_one_byte_less_fits() {
    // The same 4 MiB a thousand times: nothing forbids that.
    let ram = guest_ram(16);
    for (last, want) in [(4 << 20, Err(QueueError::ChainTooLarge)), ((4 << 20) - 1, Ok(u32::MAX))] {
        let driver = DriverQueue::new(&ram, BASE, 16, BOTH);
        let mut queue = queue(&ram, &driver, BOTH);
        for i in 0..1023 {
            write_descriptor(&ram, TABLES + 16 * u64::from(i), DATA, 4 << 20, WRITE | NEXT, i + 1);
        }
        write_descriptor(&ram, TABLES + 16 * 1023, DATA, last, WRITE, 0);
        driver.set_descriptor(0, TABLES, 16 * 1024, INDIRECT, 0);
        let got = pop_first(&driver, &mut queue).map(|chain| chain.unwrap().writable().len());
        assert_eq!(got, want);
    }
}

#[test]
fn buffers_outside_ram_are_refused_unless_they_are_empty() {
    for (addr, len) in [(RAM_END, 1), (RAM_END - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 16)] {
        let (_ram, driver, mut queue) = pair(4, 0);
        driver.set_descriptor(0, addr, len, 0, 0);
        let error = QueueError::BufferOutsideRam { addr, len };
        assert_eq!(pop_first(&driver, &mut queue).unwrap_err(), error);
    }
    let (_ram, driver, mut queue) = pair(4, 0);
    driver.set_descriptor(0, u64::MAX, 0, NEXT, 1);
    driver.set_descriptor(1, RAM_END - 1, 1, WRITE, 0);
    let chain = pop_first(&driver, &mut queue).unwrap().unwrap();
    assert_eq!((buffers(chain.readable()), buffers(chain.writable())), (vec![], vec![(RAM_END - 1, 1)]));
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_refused() {
    for first_len in [0, 1] {
        let (_ram, driver, mut queue) = pair(4, 0);
        driver.set_descriptor(0, DATA, first_len, WRITE | NEXT, 1);
        driver.set_descriptor(1, DATA, 1, 0, 0);
        let popped = pop_first(&driver, &mut queue);
        assert_eq!(popped.unwrap_err(), QueueError::ReadableAfterWritable);
    }
}

#[test]
fn indirect_tables_are_followed_only_where_they_may_be() {
    let table = |features, len: u32, flags, inner_flags| {
        let (ram, driver, mut queue) = pair(4, features);
        write_descriptor(&ram, TABLES, DATA, 8, inner_flags, 1);
        write_descriptor(&ram, TABLES + 16, DATA, 8, 0, 0);
        driver.set_descriptor(0, TABLES, len, flags, 1);
        driver.set_descriptor(1, DATA, 4, 0, 0);
        pop_first(&driver, &mut queue).map(|chain| chain.unwrap().readable().len())
    };
    assert_eq!(table(BOTH, 32, INDIRECT, NEXT), Ok(16));
    // The write flag of the table's descriptor means nothing (2.7.5.3.2).
    assert_eq!(table(BOTH, 32, INDIRECT | WRITE, NEXT), Ok(16));
    assert_eq!(table(0, 32, INDIRECT, NEXT), Err(QueueError::Indirect("not negotiated")));
    assert_eq!(
        table(BOTH, 32, INDIRECT | NEXT, 0),
        Err(QueueError::Indirect("not the last descriptor of its chain"))
    );
    assert_eq!(table(BOTH, 32, INDIRECT, INDIRECT), Err(QueueError::Indirect("inside another one")));
    for len in [0, 1, 15, 17, 31] {
        let error = QueueError::Indirect("invalid size");
        assert_eq!(table(BOTH, len, INDIRECT, 0), Err(error));
    }
    assert_eq!(table(BOTH, 16, INDIRECT, NEXT), Err(QueueError::DescriptorIndex { index: 1, len: 1 }));
    assert_eq!(table(BOTH, 1 << 30, INDIRECT, 0), Err(QueueError::Indirect("not in guest memory")));
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let (ram, driver, mut queue) = pair(4, BOTH);
    write_descriptor(&ram, TABLES, DATA + 8, 8, WRITE, 0);
    driver.set_descriptor(0, DATA, 8, NEXT, 3);
    driver.set_descriptor(3, TABLES, 16, INDIRECT, 0);
    let chain = pop_first(&driver, &mut queue).unwrap().unwrap();
    assert_eq!(
        (buffers(chain.readable()), buffers(chain.writable())),
        (vec![(DATA, 8)], vec![(DATA + 8, 8)])
    );
}

#[test]
fn a_chain_that_is_given_back_comes_again() {
    let (_ram, mut driver, mut queue) = pair(4, 0);
    let first = driver.add(&[(DATA, 1)], &[]).unwrap();
    let second = driver.add(&[(DATA, 2)], &[]).unwrap();
    driver.publish();
    let chain = pop(&mut queue).unwrap().unwrap();
    queue.rewind(&chain).unwrap();
    assert_eq!(queue.in_flight(), 0);
    assert!(queue.has_available().unwrap());
    assert_eq!(pop(&mut queue).unwrap().unwrap().head(), first);
    assert_eq!(pop(&mut queue).unwrap().unwrap().head(), second);
    assert!(!queue.has_available().unwrap());
}

#[test]
fn a_chain_that_is_not_in_flight_cannot_be_used() {
    let (_ram, mut driver, mut queue) = pair(4, 0);
    let head = driver.add(&[(DATA, 1)], &[]).unwrap();
    driver.publish();
    pop(&mut queue).unwrap().unwrap();
    queue.add_used(head, 0).unwrap();
    assert_eq!(queue.add_used(head, 0), Err(QueueError::NotInFlight(head)));
    let (_ram, _driver, mut queue) = pair(4, 0);
    assert_eq!(queue.add_used(u16::MAX, 0), Err(QueueError::NotInFlight(u16::MAX)));
}

#[test]
fn what_the_queue_writes_is_counted_as_dirty() {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let ram = tracked_guest_ram(RAM_MIB);
    let mut driver = DriverQueue::new(&ram, BASE, 256, 0);
    let mut queue = queue(&ram, &driver, 0);
    driver.add(&[], &[(DATA + 0x1ffc, 8)]).unwrap();
    driver.publish();
    let dirty = |addr: u64| ram.memory().iter().next().unwrap().bitmap().dirty_at(addr as usize);
    let region: &vm_memory::MmapRegion<_> = ram.memory().iter().next().unwrap();
    region.bitmap().as_ref().unwrap().reset();
    let chain = pop(&mut queue).unwrap().unwrap();
    assert_eq!(chain.writable().write(&ram, &[1; 8]).unwrap(), 8);
    queue.add_used(chain.head(), 8).unwrap();
    assert!(queue.publish().unwrap());
    assert!(dirty(DATA + 0x1000) && dirty(DATA + 0x2000) && !dirty(DATA) && !dirty(DATA + 0x3000));
    assert!(dirty(driver.state().used_ring) && !dirty(driver.state().desc_table));
}

#[test]
fn interrupts_come_as_the_driver_wants_them() {
    for features in [0, feature::RING_EVENT_IDX] {
        let (_ram, mut driver, mut queue) = pair(8, features);
        let mut serve = |driver: &mut DriverQueue| {
            driver.add(&[(DATA, 1)], &[]).unwrap();
            driver.publish();
            let chain = pop(&mut queue).unwrap().unwrap();
            queue.add_used(chain.head(), 0).unwrap();
            let wanted = queue.publish().unwrap();
            assert!(!queue.publish().unwrap(), "nothing new, no interrupt");
            driver.take_used().unwrap();
            wanted
        };
        driver.disable_interrupts();
        assert!(!serve(&mut driver));
        driver.enable_interrupts();
        assert!(serve(&mut driver));
        driver.disable_interrupts();
        assert!(!serve(&mut driver));
    }
}

#[test]
fn one_publish_covers_a_batch_and_the_entry_that_is_waited_for_may_be_any_of_it() {
    let (_ram, mut driver, mut queue) = pair(8, feature::RING_EVENT_IDX);
    for waited_for in 0..4 {
        let before = driver.used_idx();
        for _ in 0..4 {
            driver.add(&[(DATA, 1)], &[]).unwrap();
        }
        driver.publish();
        driver.set_used_event(before + waited_for);
        while let Some(chain) = pop(&mut queue).unwrap() {
            queue.add_used(chain.head(), 0).unwrap();
        }
        assert_eq!(driver.used_idx(), before);
        assert!(queue.publish().unwrap());
        assert_eq!(driver.used_idx(), before + 4);
        while driver.take_used().is_some() {}
    }
}

#[test]
fn ranges_of_buffers_split_at_any_byte() {
    let (ram, mut driver, mut queue) = pair(8, 0);
    let data: Vec<u8> = (0..100).collect();
    ram.memory().write_slice(&data, GuestAddress(DATA)).unwrap();
    driver.add(&[(DATA, 10), (DATA + 10, 1), (DATA + 11, 39)], &[(DATA + 0x1000, 50)]).unwrap();
    driver.publish();
    let chain = pop(&mut queue).unwrap().unwrap();
    for at in 0..=50u32 {
        let (first, rest) = chain.readable().split_at(at).unwrap();
        let mut read = [0; 60];
        assert_eq!(first.read(&ram, &mut read).unwrap(), at as usize);
        assert_eq!(rest.read(&ram, &mut read[at as usize..]).unwrap(), 50 - at as usize);
        assert_eq!(read[..50], data[..50]);
        let (second, third) = rest.split_at(rest.len() / 2).unwrap();
        assert_eq!(second.len() + third.len(), rest.len());
        assert_eq!(second.iter().chain(third.iter()).map(|b| b.len).sum::<u32>(), rest.len());
    }
    assert!(chain.readable().split_at(51).is_none());
    assert!(chain.readable().split_at(50).unwrap().1.is_empty());
    assert_eq!(chain.writable().write(&ram, &data).unwrap(), 50);
}

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

    /// Garbage everywhere: an error or a chain, never a panic, and never more in flight than the
    /// queue has room for.
    #[test]
    fn garbage_in_the_rings_breaks_nothing(
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

    /// A driver by the book, a device in any rhythm: chains arrive whole and in order, every one
    /// comes back with its length, and whoever sleeps is woken.
    #[test]
    fn nothing_is_lost_changed_or_forgotten(
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
                    // As a transport does: everything is looked at, and everybody is told.
                    (awake, driver_awake) = (true, true);
                }
                _ => {}
            }
            prop_assert_eq!(usize::from(queue.in_flight()), held.len());
        }
    }
}

/// Waits for a signal, for so long that only a lost one can be the reason for none.
fn wait(event: &EventFd) {
    let mut fds = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)];
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "nobody was woken: a notification is lost");
    event.take();
}

#[test]
fn two_threads_that_sleep_whenever_they_may_never_sleep_for_good() {
    const REQUESTS: u32 = 30_000;
    for features in [0, feature::RING_EVENT_IDX] {
        let (ram, mut driver, mut queue) = pair(4, features);
        let (kick, interrupt) = (Arc::new(EventFd::new().unwrap()), Arc::new(EventFd::new().unwrap()));
        let device = {
            let (kick, interrupt) = (Arc::clone(&kick), Arc::clone(&interrupt));
            std::thread::spawn(move || {
                let (mut chain, mut served) = (Chain::new(), 0);
                while served < REQUESTS {
                    wait(&kick);
                    loop {
                        queue.disable_notifications().unwrap();
                        while queue.pop(&mut chain).unwrap() {
                            let mut number = [0; 4];
                            chain.readable().read(queue.ram(), &mut number).unwrap();
                            chain.writable().write(queue.ram(), &number).unwrap();
                            queue.add_used(chain.head(), 4).unwrap();
                            served += 1;
                        }
                        if queue.publish().unwrap() {
                            interrupt.signal();
                        }
                        if !queue.enable_notifications().unwrap() {
                            break;
                        }
                    }
                }
            })
        };
        let (mut sent, mut received) = (0, 0);
        while received < REQUESTS {
            while sent < REQUESTS && driver.free() >= 2 {
                let at = DATA + u64::from(sent % 64) * 16;
                ram.memory().write_obj(sent, GuestAddress(at)).unwrap();
                driver.add(&[(at, 4)], &[(at + 8, 4)]).unwrap();
                sent += 1;
            }
            if driver.publish() {
                kick.signal();
            }
            driver.disable_interrupts();
            while driver.take_used().is_some() {
                let at = DATA + u64::from(received % 64) * 16;
                assert_eq!(ram.memory().read_obj::<u32>(GuestAddress(at + 8)).unwrap(), received);
                received += 1;
            }
            if received < sent && !driver.enable_interrupts() {
                wait(&interrupt);
            }
        }
        device.join().unwrap();
    }
}
