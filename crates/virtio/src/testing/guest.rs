//! A guest's view of one device, whichever transport it is on.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memory::GuestRam;

use super::{DriverQueue, TestWorker};
use crate::device::{Device, feature};
use crate::queue::QueueState;
use crate::transport::mmio::{IrqLine, MmioState, MmioTransport};
use crate::transport::pci::{MsiMessage, MsiVectors, PciRoot, PciState, PciTransport};
use crate::transport::{Attachment, CommonState, IoEventFds, NotifyMatch, RestoreError, Status};
use sync::EventFd;
use sync::locked;

/// Address of the device on mmio.
pub const MMIO: u64 = 0xc000_1000;
/// Address of its BAR on PCI.
pub const BAR: u64 = 0x40_0000_0000;
/// The window for BARs.
pub const WINDOW: std::ops::Range<u64> = BAR..BAR + (1 << 30);

/// A kind of transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// virtio-mmio.
    Mmio,
    /// virtio-pci.
    Pci,
}

/// Interrupts that reached the guest.
#[derive(Debug, Default)]
pub struct Interrupts {
    line: AtomicU32,
    vectors: Mutex<BTreeMap<u16, (MsiMessage, u32)>>,
}

impl Interrupts {
    /// Edges of the line, or messages of all vectors, since this was last asked.
    pub fn take(&self) -> u32 {
        let mut vectors = locked(&self.vectors);
        let messages: u32 = vectors.values_mut().map(|(_, count)| std::mem::take(count)).sum();
        self.line.swap(0, Ordering::SeqCst) + messages
    }

    /// The message that a vector is set to send, and how often it has since this was last asked.
    pub fn take_vector(&self, vector: u16) -> Option<(MsiMessage, u32)> {
        let mut vectors = locked(&self.vectors);
        vectors.get_mut(&vector).map(|(message, count)| (*message, std::mem::take(count)))
    }
}

struct Line(Arc<Interrupts>);

impl IrqLine for Line {
    fn trigger(&self) {
        self.0.line.fetch_add(1, Ordering::SeqCst);
    }
}

struct Vectors(Arc<Interrupts>);

impl MsiVectors for Vectors {
    fn set(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        locked(&self.0.vectors).entry(vector).or_insert((message, 0)).0 = message;
        Ok(())
    }

    fn trigger(&self, vector: u16) {
        let mut vectors = locked(&self.0.vectors);
        vectors.get_mut(&vector).expect("a vector is set before it is triggered").1 += 1;
    }
}

/// The kernel's table of kicks.
#[derive(Debug, Default)]
pub struct FakeIoEventFds {
    events: Mutex<Vec<(u64, NotifyMatch, EventFd)>>,
}

impl FakeIoEventFds {
    /// A guest's write. True if it was a kick, and the transport never sees it.
    pub fn write(&self, addr: u64, value: u32) -> bool {
        let events = locked(&self.events);
        let hit = events.iter().find(|(at, matching, _)| {
            *at == addr
                && matches!(matching, NotifyMatch::Any | NotifyMatch::U32(_))
                && (*matching == NotifyMatch::Any || *matching == NotifyMatch::U32(value))
        });
        hit.inspect(|(_, _, event)| event.signal()).is_some()
    }

    /// The registered ioeventfds: addresses and values.
    pub fn registered(&self) -> Vec<(u64, NotifyMatch)> {
        locked(&self.events).iter().map(|(addr, matching, _)| (*addr, *matching)).collect()
    }
}

impl IoEventFds for FakeIoEventFds {
    fn register(&self, addr: u64, matching: NotifyMatch, event: &EventFd) -> io::Result<()> {
        let mut events = locked(&self.events);
        if events.iter().any(|(at, other, _)| (*at, *other) == (addr, matching)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        events.push((addr, matching, event.try_clone()?));
        Ok(())
    }

    fn unregister(&self, addr: u64, matching: NotifyMatch, _event: &EventFd) {
        locked(&self.events).retain(|(at, other, _)| (*at, *other) != (addr, matching));
    }
}

enum Transport {
    Mmio(Box<MmioTransport>),
    Pci(Box<PciTransport>),
}

/// A transport's state, whichever it is.
#[derive(Debug, Clone, PartialEq)]
pub enum TransportState {
    /// virtio-mmio's.
    Mmio(MmioState),
    /// virtio-pci's.
    Pci(PciState),
}

impl TransportState {
    /// The part that all transports have.
    pub fn common(&mut self) -> &mut CommonState {
        match self {
            TransportState::Mmio(state) => &mut state.common,
            TransportState::Pci(state) => &mut state.common,
        }
    }
}

/// A device on a transport, its worker, and the driver of a guest.
pub struct Guest {
    transport: Transport,
    /// The guest's memory.
    pub ram: GuestRam,
    /// Runs the device's tasks.
    pub worker: TestWorker,
    /// The interrupts that reached the guest.
    pub interrupts: Arc<Interrupts>,
    /// The ioeventfds, as KVM would signal them.
    pub io_events: Arc<FakeIoEventFds>,
}

/// The registers that both transports have: offset and width on mmio, and on PCI.
type Register = (u64, (u64, usize));

const DEVICE_FEATURE_SELECT: Register = (0x14, (0x00, 4));
const DEVICE_FEATURE: Register = (0x10, (0x04, 4));
const DRIVER_FEATURE_SELECT: Register = (0x24, (0x08, 4));
const DRIVER_FEATURE: Register = (0x20, (0x0c, 4));
const STATUS: Register = (0x70, (0x14, 1));
const GENERATION: Register = (0xfc, (0x15, 1));
const QUEUE_SELECT: Register = (0x30, (0x16, 2));
const QUEUE_SIZE: Register = (0x38, (0x18, 2));
const QUEUE_READY: Register = (0x44, (0x1c, 2));
const QUEUE_ADDRS: [(Register, Register); 3] = [
    ((0x80, (0x20, 4)), (0x84, (0x24, 4))),
    ((0x90, (0x28, 4)), (0x94, (0x2c, 4))),
    ((0xa0, (0x30, 4)), (0xa4, (0x34, 4))),
];

impl Guest {
    /// Puts `device` on a transport.
    pub fn new(kind: Kind, device: Box<dyn Device>) -> Self {
        Self::with(kind, device, super::guest_ram(4), TestWorker::new())
    }

    /// As [`Guest::new`], with this memory and worker.
    pub fn with(kind: Kind, device: Box<dyn Device>, ram: GuestRam, worker: TestWorker) -> Self {
        let (interrupts, io_events) = (Arc::new(Interrupts::default()), Arc::new(FakeIoEventFds::default()));
        let attachment = Attachment {
            name: "test".into(),
            device,
            memory: ram.clone(),
            workers: worker.workers(),
            failures: Arc::new(()),
        };
        let events = Arc::clone(&io_events) as Arc<dyn IoEventFds>;
        let transport = match kind {
            Kind::Mmio => {
                let line = Box::new(Line(Arc::clone(&interrupts)));
                let mmio =
                    MmioTransport::new(attachment, MMIO, line, events).expect("a device can be attached");
                Transport::Mmio(Box::new(mmio))
            }
            Kind::Pci => {
                let vectors = Box::new(Vectors(Arc::clone(&interrupts)));
                let root = PciRoot::new(WINDOW, events);
                let pci = root.new_function(attachment, BAR, vectors).expect("a device can be attached");
                Transport::Pci(Box::new(pci))
            }
        };
        Guest { transport, ram, worker, interrupts, io_events }
    }

    /// The kind of its transport.
    pub fn kind(&self) -> Kind {
        match self.transport {
            Transport::Mmio(_) => Kind::Mmio,
            Transport::Pci(_) => Kind::Pci,
        }
    }

    /// The mmio transport. Panics if it is another.
    pub fn mmio(&mut self) -> &mut MmioTransport {
        match &mut self.transport {
            Transport::Mmio(mmio) => mmio,
            Transport::Pci(_) => panic!("the device is on PCI"),
        }
    }

    /// The PCI transport. Panics if it is another.
    pub fn pci(&mut self) -> &mut PciTransport {
        match &mut self.transport {
            Transport::Pci(pci) => pci,
            Transport::Mmio(_) => panic!("the device is on mmio"),
        }
    }

    fn read(&mut self, register: Register) -> u32 {
        let mut data = [0; 4];
        match &mut self.transport {
            Transport::Mmio(mmio) => mmio.read(register.0, &mut data),
            Transport::Pci(pci) => pci.read_bar(register.1.0, &mut data[..register.1.1]),
        }
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: Register, value: u32) {
        let data = value.to_le_bytes();
        match &mut self.transport {
            // The worker is on this very thread: nothing comes of waiting for a reset.
            Transport::Mmio(mmio) => drop(mmio.write(register.0, &data)),
            Transport::Pci(pci) => pci.write_bar(register.1.0, &data[..register.1.1]),
        }
    }

    /// The status register.
    pub fn status(&mut self) -> u8 {
        self.read(STATUS) as u8
    }

    /// Writes the status register.
    pub fn set_status(&mut self, status: u8) {
        self.write(STATUS, status.into());
    }

    /// Reads the status until it is 0, while the device drains.
    pub fn reset(&mut self) {
        self.set_status(0);
        while self.status() != 0 {
            self.worker.run();
        }
    }

    /// All features that are offered.
    pub fn device_features(&mut self) -> u64 {
        self.write(DEVICE_FEATURE_SELECT, 1);
        let high = self.read(DEVICE_FEATURE);
        self.write(DEVICE_FEATURE_SELECT, 0);
        u64::from(high) << 32 | u64::from(self.read(DEVICE_FEATURE))
    }

    /// Accepts features.
    pub fn set_driver_features(&mut self, features: u64) {
        for (select, half) in [(0, features), (1, features >> 32)] {
            self.write(DRIVER_FEATURE_SELECT, select);
            self.write(DRIVER_FEATURE, half as u32);
        }
    }

    /// The generation of the configuration space.
    pub fn config_generation(&mut self) -> u32 {
        self.read(GENERATION)
    }

    /// Selects a queue.
    pub fn select_queue(&mut self, index: u16) {
        self.write(QUEUE_SELECT, index.into());
    }

    /// Whether the selected queue is enabled.
    pub fn queue_ready(&mut self) -> bool {
        self.read(QUEUE_READY) == 1
    }

    /// The largest size of the selected queue (on PCI, only before a size is chosen).
    pub fn queue_max_size(&mut self) -> u32 {
        self.read(((0x34), (0x18, 2)))
    }

    /// Sets up the selected queue, and enables it.
    pub fn set_up_queue(&mut self, queue: &QueueState) {
        self.write(QUEUE_SIZE, queue.size.into());
        let addrs = [queue.desc_table, queue.avail_ring, queue.used_ring];
        for ((low, high), addr) in QUEUE_ADDRS.into_iter().zip(addrs) {
            self.write(low, addr as u32);
            self.write(high, (addr >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// What a driver does up to `FEATURES_OK`, with all features but for `EVENT_IDX` if `event_idx`
    /// is false.
    pub fn negotiate(&mut self, event_idx: bool) -> u64 {
        self.negotiate_without(if event_idx { 0 } else { feature::RING_EVENT_IDX })
    }

    /// What a driver does up to `FEATURES_OK`, with all features but for `without`. Returns those
    /// that it accepts.
    pub fn negotiate_without(&mut self, without: u64) -> u64 {
        self.reset();
        self.set_status(Status::ACKNOWLEDGE);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        let features = self.device_features() & !without;
        self.set_driver_features(features);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        features
    }

    /// A whole driver: features, one queue of `size` at `base`, vectors, and `DRIVER_OK`.
    pub fn start(&mut self, base: u64, size: u16, event_idx: bool) -> DriverQueue {
        self.start_without(base, size, if event_idx { 0 } else { feature::RING_EVENT_IDX })
    }

    /// As [`Guest::start`], with all features but for `without`.
    pub fn start_without(&mut self, base: u64, size: u16, without: u64) -> DriverQueue {
        let features = self.negotiate_without(without);
        let driver = DriverQueue::new(&self.ram, base, size, features);
        self.select_queue(0);
        self.set_up_queue(&driver.state());
        self.map_vectors();
        self.set_status(RUNNING);
        self.worker.run();
        driver
    }

    /// On PCI, enables MSI-X with a vector for the configuration (0) and the selected queue (1),
    /// all of them open.
    pub fn map_vectors(&mut self) {
        if let Transport::Pci(pci) = &mut self.transport {
            for vector in 0..2u64 {
                let entry = 0x8000 + 16 * vector;
                pci.write_bar(entry, &(0xfee0_0000u64).to_le_bytes());
                pci.write_bar(entry + 8, &(0x40 + vector as u32).to_le_bytes());
                pci.write_bar(entry + 12, &0u32.to_le_bytes());
            }
            let control = find_capability(pci, 0x11) + 2;
            pci.write_config(control, &0x8000u16.to_le_bytes());
            pci.write_bar(0x10, &0u16.to_le_bytes());
            pci.write_bar(0x1a, &1u16.to_le_bytes());
        }
    }

    /// Doorbells a queue, through the kernel as long as it would see it.
    pub fn kick(&mut self, index: u32) {
        let addr = match &self.transport {
            Transport::Mmio(_) => MMIO + 0x50,
            Transport::Pci(_) => BAR + 0x6000 + 4 * u64::from(index),
        };
        if !self.io_events.write(addr, index) {
            self.kick_slowly(index);
        }
        self.worker.run();
    }

    /// A kick that reaches the transport.
    pub fn kick_slowly(&mut self, index: u32) {
        match &mut self.transport {
            Transport::Mmio(mmio) => drop(mmio.write(0x50, &index.to_le_bytes())),
            Transport::Pci(pci) => {
                pci.write_bar(0x6000 + 4 * u64::from(index), &(index as u16).to_le_bytes());
            }
        }
    }

    /// Reads the device's configuration space.
    pub fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        match &mut self.transport {
            Transport::Mmio(mmio) => mmio.read(0x100 + offset, data),
            Transport::Pci(pci) => pci.read_bar(0x4000 + offset, data),
        }
    }

    /// Writes the device's configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        match &mut self.transport {
            Transport::Mmio(mmio) => drop(mmio.write(0x100 + offset, data)),
            Transport::Pci(pci) => pci.write_bar(0x4000 + offset, data),
        }
    }

    /// How often the device was found broken.
    pub fn broken_count(&self) -> u64 {
        match &self.transport {
            Transport::Mmio(mmio) => mmio.broken_count(),
            Transport::Pci(pci) => pci.broken_count(),
        }
    }

    /// Pauses the worker, saves, and resumes the worker.
    pub fn save(&mut self) -> TransportState {
        let paused = self.worker.pause();
        assert!(paused.try_recv().is_ok(), "nothing is in flight");
        let state = self.save_paused();
        self.worker.resume();
        state
    }

    /// Saves. The worker is paused.
    pub fn save_paused(&mut self) -> TransportState {
        match &mut self.transport {
            Transport::Mmio(mmio) => TransportState::Mmio(mmio.save()),
            Transport::Pci(pci) => TransportState::Pci(pci.save()),
        }
    }

    /// Makes this fresh one what was saved.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        match (&mut self.transport, state) {
            (Transport::Mmio(mmio), TransportState::Mmio(state)) => mmio.restore(state)?,
            (Transport::Pci(pci), TransportState::Pci(state)) => pci.restore(state)?,
            _ => panic!("the state is another transport's"),
        }
        self.worker.run();
        Ok(())
    }

    /// Takes the device off. False if it has not drained.
    pub fn unplug(&mut self) -> bool {
        match &mut self.transport {
            Transport::Mmio(mmio) => mmio.unplug(Duration::ZERO),
            Transport::Pci(pci) => pci.unplug(Duration::ZERO),
        }
    }
}

/// The status of a driver that runs.
pub const RUNNING: u8 = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;

/// Where the first capability `id` is. Panics if there is none.
pub fn find_capability(pci: &mut PciTransport, id: u8) -> usize {
    let mut byte = |at: usize| {
        let mut data = [0];
        pci.read_config(at, &mut data);
        usize::from(data[0])
    };
    let mut at = byte(0x34);
    while at != 0 && byte(at) != usize::from(id) {
        at = byte(at + 1);
    }
    assert_ne!(at, 0, "there is a capability {id:#x}");
    at
}
