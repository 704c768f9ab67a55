//! The queue against a driver that behaves, one that does not, and an oracle.

mod properties;

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
fn device_that_leaves_chains_is_kicked_for_the_next_one() {
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
fn chain_with_a_loop_is_refused() {
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
fn iovec_outside_ram_is_the_error_of_its_buffer() {
    let (addr, len) = (RAM_END - 1, 2);
    let outside = memory::iovec::GuestIoVec::new()
        .push(&guest_ram(RAM_MIB), addr, len as usize, memory::iovec::Access::Read)
        .unwrap_err();
    assert_eq!(QueueError::from(outside), QueueError::BufferOutsideRam { addr, len });
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
fn indirect_tables_are_followed_only_where_allowed() {
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
fn rewound_chain_is_popped_again() {
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
fn writes_of_the_queue_mark_pages_dirty() {
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
fn one_publish_interrupts_for_any_entry_of_the_batch() {
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

/// Waits for a signal, for so long that only a lost one can be the reason for none.
fn wait(event: &EventFd) {
    let mut fds = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)];
    let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "no thread was woken: a notification is lost");
    event.take();
}

#[test]
fn sleeping_driver_and_device_always_wake_each_other() {
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
