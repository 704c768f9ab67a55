//! The ioeventfds of all functions of a bus.
//!
//! A function's doorbells are registered at the address where its BAR is decoded, or was last. They
//! stay when decoding is disabled: a guest that sizes a BAR disables and enables it, which would
//! cost dozens of changes in the kernel. But another function may move to an address that one has
//! left, and the kernel would still signal the first. So all functions of a bus share this table.
//!
//! # Invariant
//!
//! Kicks at an address signal a function that decodes it, if there is one. If a guest puts two BARs
//! at one address, it is one of the two. The other's kicks reach its transport when it is alone at
//! an address, at the latest when its BAR is moved.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::layout;
use crate::transport::device_status::DeviceStatus;
use crate::transport::{IoEventFds, NotifyMatch};
use sync::EventFd;
use sync::locked;

/// The id of a function in the table.
pub(super) type FunctionKey = u64;

/// The ioeventfds of all functions of a bus.
pub(super) struct Doorbells {
    io_events: Arc<dyn IoEventFds>,
    functions: Mutex<Functions>,
}

#[derive(Default)]
struct Functions {
    next: FunctionKey,
    by_key: BTreeMap<FunctionKey, Function>,
}

struct Function {
    device_status: Arc<DeviceStatus>,
    /// The kick eventfds of the queues, and whether each is registered.
    events: Vec<(Arc<EventFd>, bool)>,
    /// The address at which its BAR is decoded.
    decoded: Option<u64>,
    /// The address of the BAR for which its kicks are registered.
    placed: Option<u64>,
}

impl Doorbells {
    pub(super) fn new(io_events: Arc<dyn IoEventFds>) -> Self {
        Doorbells { io_events, functions: Mutex::default() }
    }

    /// Adds a function, which does not decode its BAR yet. `bar` is the address where it will most
    /// likely do.
    pub(super) fn add(
        &self,
        bar: u64,
        events: impl Iterator<Item = Arc<EventFd>>,
        device_status: Arc<DeviceStatus>,
    ) -> FunctionKey {
        let functions = &mut *locked(&self.functions);
        let key = functions.next;
        functions.next += 1;
        let events = events.map(|event| (event, false)).collect();
        functions.by_key.insert(key, Function { device_status, events, decoded: None, placed: None });
        self.place(functions, key, bar);
        key
    }

    /// Handles a change of a function's BAR: it is decoded at `to`, or no longer decoded.
    pub(super) fn moved(&self, key: FunctionKey, to: Option<u64>) {
        let functions = &mut *locked(&self.functions);
        let Some(function) = functions.by_key.get_mut(&key) else { return };
        let before = function.placed;
        function.decoded = to;
        if let Some(bar) = to {
            self.place(functions, key, bar);
        }
        if let Some(left) = before
            && to != before
        {
            self.register_another(functions, left);
        }
    }

    /// Removes a function.
    pub(super) fn remove(&self, key: FunctionKey) {
        let functions = &mut *locked(&self.functions);
        if let Some(mut function) = functions.by_key.remove(&key)
            && let Some(left) = self.withdraw(&mut function)
        {
            self.register_another(functions, left);
        }
    }

    /// Registers a function's kicks for a BAR at `bar`, unless another function decodes that
    /// address and is registered there.
    fn place(&self, functions: &mut Functions, key: FunctionKey, bar: u64) {
        let holder = functions.by_key.iter_mut().find(|(_, function)| function.placed == Some(bar));
        match holder {
            Some((&holder, _)) if holder == key => return,
            Some((_, holder)) if holder.decoded == Some(bar) => {
                if let Some(function) = functions.by_key.get_mut(&key) {
                    self.withdraw(function);
                    function.device_status.complain(&format_args!("another function is at {bar:#x}, too"));
                }
                return;
            }
            Some((_, holder)) => {
                self.withdraw(holder);
            }
            None => {}
        }
        let Some(function) = functions.by_key.get_mut(&key) else { return };
        self.withdraw(function);
        function.placed = Some(bar);
        for (addr, (event, taken)) in addrs(bar).zip(&mut function.events) {
            match self.io_events.register(addr, NotifyMatch::Any, event) {
                Ok(()) => *taken = true,
                Err(error) => {
                    function
                        .device_status
                        .complain(&format_args!("kicks at {addr:#x} leave the kernel: {error}"));
                }
            }
        }
    }

    /// Unregisters a function's kicks. Returns the address of the BAR for which they were
    /// registered.
    fn withdraw(&self, function: &mut Function) -> Option<u64> {
        let bar = function.placed.take()?;
        for (addr, (event, taken)) in addrs(bar).zip(&mut function.events) {
            if std::mem::take(taken) {
                self.io_events.unregister(addr, NotifyMatch::Any, event);
            }
        }
        Some(bar)
    }

    /// Registers a function that decodes `bar` and was not registered there.
    fn register_another(&self, functions: &mut Functions, bar: u64) {
        let waits = |function: &Function| function.decoded == Some(bar) && function.placed != Some(bar);
        let waiting = functions.by_key.iter().find(|(_, function)| waits(function)).map(|(&key, _)| key);
        if let Some(key) = waiting {
            self.place(functions, key, bar);
        }
    }
}

/// The addresses of the doorbells of a BAR at `bar`.
fn addrs(bar: u64) -> impl Iterator<Item = u64> {
    (bar + u64::from(layout::NOTIFY)..).step_by(layout::NOTIFY_MULTIPLIER as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeIoEventFds;
    use proptest::prelude::*;

    /// A table with functions of 2, 1 and 3 queues, first at bars 0, 1 and 2.
    struct Bus {
        doorbells: Doorbells,
        kernel: Arc<FakeIoEventFds>,
        functions: Vec<(FunctionKey, Vec<Arc<EventFd>>)>,
    }

    const QUEUES: [usize; 3] = [2, 1, 3];

    fn bar(n: u64) -> u64 {
        0x40_0000_0000 + n * super::super::BAR_SIZE
    }

    impl Bus {
        fn new() -> Self {
            let kernel = Arc::<FakeIoEventFds>::default();
            let doorbells = Doorbells::new(Arc::clone(&kernel) as Arc<dyn IoEventFds>);
            let functions = (0..).zip(QUEUES).map(|(n, queues)| {
                let events: Vec<_> = (0..queues).map(|_| Arc::new(EventFd::new().unwrap())).collect();
                (
                    doorbells.add(
                        bar(n),
                        events.iter().cloned(),
                        DeviceStatus::new("test".into(), Arc::new(())),
                    ),
                    events,
                )
            });
            let functions = functions.collect();
            Bus { doorbells, kernel, functions }
        }

        fn moved(&self, function: usize, to: Option<u64>) {
            self.doorbells.moved(self.functions[function].0, to.map(bar));
        }

        /// Kicks queue `queue` of the function at a BAR. Returns the function that the kernel
        /// signals.
        fn kick(&self, at: u64, queue: u64) -> Option<usize> {
            let took = self.kernel.write(bar(at) + 0x6000 + 4 * queue, 0);
            let mut heard = None;
            for (n, (_, events)) in self.functions.iter().enumerate() {
                for (index, event) in (0..).zip(events) {
                    if event.take() > 0 {
                        assert_eq!((heard.replace(n), index), (None, queue));
                    }
                }
            }
            assert_eq!(took, heard.is_some());
            heard
        }
    }

    #[test]
    fn function_at_a_left_address_gets_the_kicks_there() {
        let bus = Bus::new();
        bus.moved(0, Some(1));
        assert_eq!((bus.kick(1, 0), bus.kick(1, 1)), (Some(0), Some(0)));
        // The other function, enabled later, at another address.
        bus.moved(1, Some(0));
        assert_eq!((bus.kick(0, 0), bus.kick(0, 1), bus.kick(1, 0)), (Some(1), None, Some(0)));
    }

    #[test]
    fn a_function_whose_decoding_is_off_gives_way() {
        let bus = Bus::new();
        bus.moved(2, Some(2));
        bus.moved(2, None);
        bus.moved(1, Some(2));
        assert_eq!((bus.kick(2, 0), bus.kick(2, 1)), (Some(1), None));
        bus.moved(2, Some(5));
        assert_eq!(bus.kick(5, 2), Some(2));
    }

    #[test]
    fn places_that_are_exchanged_one_after_the_other_end_up_right() {
        let bus = Bus::new();
        (0..3).for_each(|n| bus.moved(n, Some(n as u64)));
        // Two functions share an address for a while.
        bus.moved(0, Some(1));
        assert_eq!(bus.kick(1, 0), Some(1));
        bus.moved(1, Some(0));
        assert_eq!((bus.kick(0, 0), bus.kick(1, 0), bus.kick(1, 1)), (Some(1), Some(0), Some(0)));
        bus.doorbells.remove(bus.functions[0].0);
        bus.doorbells.remove(bus.functions[1].0);
        bus.doorbells.remove(bus.functions[2].0);
        assert_eq!(bus.kernel.registered(), []);
    }

    proptest! {
        /// A kick signals a function that decodes the address, whatever a guest does with its BARs.
        #[test]
        fn kicks_go_to_who_decodes_the_address(
            moves in prop::collection::vec((0usize..3, prop::option::of(0u64..4)), 0..30)
        ) {
            let bus = Bus::new();
            let mut decoded = [None; 3];
            for (function, to) in moves {
                bus.moved(function, to);
                decoded[function] = to;
                for at in 0..4 {
                    let here: Vec<_> = (0..3).filter(|&n| decoded[n] == Some(at)).collect();
                    for queue in 0..3 {
                        let heard = bus.kick(at, queue);
                        if here.is_empty() {
                            continue;
                        }
                        prop_assert!(heard.is_none_or(|heard| here.contains(&heard)), "{:?} {:?}", heard, here);
                        if let [only] = here[..] {
                            prop_assert_eq!(heard, (queue < QUEUES[only] as u64).then_some(only));
                        }
                    }
                }
            }
        }
    }
}
