//! The PCI root: a host bridge at 00:00.0, 31 slots for devices, and the guest's accesses to them.
//!
//! - **ECAM**: 4 KiB of configuration space for each function, in memory (PCI Express 7.2.2). One
//!   bus: 1 MiB.
//! - **Ports 0xcf8 and 0xcfc** (PCI 3.2.2.3.2), for software without ECAM.
//! - **BARs**: an access in the machine's window goes to the function that decodes the address.
//!
//! All vCPU threads use the root at once. An access takes only the lock of the function it is for.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::config_space::{ConfigSpace, ConfigState, Identity};
use super::doorbells::Doorbells;
use super::function::{NOT_DECODED, PciTransport};
use super::msix::MsiVectors;
use super::{BAR_SIZE, BarWindow};
use crate::transport::{Attachment, IoEventFds};
use sync::locked;

/// The most devices: slots 1 to 31 of the one bus.
pub const MAX_DEVICES: usize = 31;

/// The size of the ECAM window in bytes: one bus.
pub const ECAM_SIZE: u64 = 1 << 20;

/// The first of the two ports.
pub const CONFIG_ADDRESS: u16 = 0xcf8;

/// Why a slot cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// There is no such slot.
    #[error("PCI slot {0}: no such slot; 1 to {MAX_DEVICES}")]
    Number(u8),
    /// Another device is in it.
    #[error("PCI slot {0}: in use")]
    Taken(u8),
    /// All slots are taken.
    #[error("no free PCI slot; {MAX_DEVICES} exist")]
    Full,
}

/// The saved state of the root, without its functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciRootState {
    /// The value of port 0xcf8.
    pub address: u32,
    /// The host bridge.
    pub bridge: ConfigState,
}

struct Slot {
    function: Arc<Mutex<PciTransport>>,
    decoded: Arc<AtomicU64>,
}

/// Bus 0.
pub struct PciRoot {
    bridge: Mutex<ConfigSpace>,
    /// Slot 1 first.
    slots: RwLock<[Option<Slot>; MAX_DEVICES]>,
    address: AtomicU32,
    window: BarWindow,
    doorbells: Arc<Doorbells>,
}

/// A register in the configuration space of a function.
#[derive(Debug, Clone, Copy)]
struct Target {
    bus: u8,
    slot: u8,
    function: u8,
    offset: usize,
}

impl PciRoot {
    /// Creates a bus with a host bridge and no devices. BARs are in `window`, and `io_events` takes
    /// their ioeventfds.
    pub fn new(window: BarWindow, io_events: Arc<dyn IoEventFds>) -> Self {
        let bridge = ConfigSpace::new(&Identity {
            // A host bridge that guests know and that needs no driver.
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        PciRoot {
            bridge: Mutex::new(bridge),
            slots: RwLock::default(),
            address: AtomicU32::new(0),
            window,
            doorbells: Arc::new(Doorbells::new(io_events)),
        }
    }

    /// Plugs a function into slot `number` (1 to 31), or the first free one. Returns the slot.
    pub fn plug(&self, number: Option<u8>, function: Arc<Mutex<PciTransport>>) -> Result<u8, SlotError> {
        let decoded = locked(&function).decoded();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let first_free = || slots.iter().zip(1u8..).find(|(slot, _)| slot.is_none());
        let number = number.or_else(|| first_free().map(|(_, number)| number)).ok_or(SlotError::Full)?;
        let index = usize::from(number).checked_sub(1).ok_or(SlotError::Number(number))?;
        let slot = slots.get_mut(index).ok_or(SlotError::Number(number))?;
        if slot.is_some() {
            return Err(SlotError::Taken(number));
        }
        *slot = Some(Slot { function, decoded });
        Ok(number)
    }

    /// Removes the function of a slot.
    pub fn unplug(&self, number: u8) -> Option<Arc<Mutex<PciTransport>>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.get_mut(usize::from(number).checked_sub(1)?)?;
        slot.take().map(|slot| slot.function)
    }

    /// Handles a read in the ECAM window at `offset`.
    pub fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        self.read_config(ecam_target(offset), data);
    }

    /// Handles a write in the ECAM window at `offset`.
    pub fn write_ecam(&self, offset: u64, data: &[u8]) {
        self.write_config(ecam_target(offset), data);
    }

    /// Handles a read of port 0xcf8 + `offset`.
    pub fn read_port(&self, offset: u16, data: &mut [u8]) {
        let address = self.address.load(Ordering::SeqCst);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&address.to_le_bytes()),
            (4..8, _) => self.read_config(port_target(address, offset), data),
            _ => data.fill(0xff),
        }
    }

    /// Handles a write of port 0xcf8 + `offset`.
    pub fn write_port(&self, offset: u16, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(address)) => self.address.store(u32::from_le_bytes(address), Ordering::SeqCst),
            (4..8, _) => {
                self.write_config(port_target(self.address.load(Ordering::SeqCst), offset), data);
            }
            _ => {}
        }
    }

    /// Handles a read at guest-physical `addr`. Returns false if no function decodes it; `data` is
    /// then all ones.
    pub fn read_bar(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((function, offset)) = self.decode(addr) else { return false };
        locked(&function).read_bar(offset, data);
        true
    }

    /// Handles a write at guest-physical `addr`. Returns false if no function decodes it.
    pub fn write_bar(&self, addr: u64, data: &[u8]) -> bool {
        let Some((function, offset)) = self.decode(addr) else { return false };
        locked(&function).write_bar(offset, data);
        true
    }

    /// The window for BARs.
    pub fn window(&self) -> BarWindow {
        self.window.clone()
    }

    /// Creates a function for this root; [`PciRoot::plug`] makes it visible. Its BAR is at `bar` in
    /// the root's window, a multiple of [`BAR_SIZE`]. It has one vector more than queues.
    pub fn new_function(
        &self,
        attachment: Attachment,
        bar: u64,
        vectors: Box<dyn MsiVectors>,
    ) -> io::Result<PciTransport> {
        PciTransport::new(attachment, bar, vectors, Arc::clone(&self.doorbells), self.window())
    }

    /// Returns the state of the root.
    pub fn save(&self) -> PciRootState {
        PciRootState { address: self.address.load(Ordering::SeqCst), bridge: locked(&self.bridge).save() }
    }

    /// Restores the state of the root.
    pub fn restore(&self, state: &PciRootState) {
        self.address.store(state.address, Ordering::SeqCst);
        locked(&self.bridge).restore(&state.bridge);
    }

    /// The function that decodes `addr`. If several do, that of the lowest slot.
    fn decode(&self, addr: u64) -> Option<(Arc<Mutex<PciTransport>>, u64)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().flatten().find_map(|slot| {
            let bar = slot.decoded.load(Ordering::Acquire);
            let offset = addr.checked_sub(bar).filter(|&offset| bar != NOT_DECODED && offset < BAR_SIZE)?;
            Some((Arc::clone(&slot.function), offset))
        })
    }

    fn function(&self, target: Target) -> Option<Arc<Mutex<PciTransport>>> {
        let index = usize::from(target.slot).checked_sub(1)?;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.get(index)?.as_ref()?;
        (target.bus == 0 && target.function == 0).then(|| Arc::clone(&slot.function))
    }

    /// Slots without a device read as all ones.
    fn read_config(&self, target: Option<Target>, data: &mut [u8]) {
        data.fill(0xff);
        let Some(target) = target else { return };
        if let Some(function) = self.function(target) {
            locked(&function).read_config(target.offset, data);
        } else if (target.bus, target.slot, target.function) == (0, 0, 0) {
            locked(&self.bridge).read(target.offset, data);
        }
    }

    fn write_config(&self, target: Option<Target>, data: &[u8]) {
        let Some(target) = target else { return };
        if let Some(function) = self.function(target) {
            locked(&function).write_config(target.offset, data);
        } else if (target.bus, target.slot, target.function) == (0, 0, 0) {
            locked(&self.bridge).write(target.offset, data);
        }
    }
}

fn ecam_target(offset: u64) -> Option<Target> {
    Some(Target {
        bus: u8::try_from(offset >> 20).ok()?,
        slot: (offset >> 15) as u8 & 0x1f,
        function: (offset >> 12) as u8 & 7,
        offset: offset as usize & 0xfff,
    })
}

/// The register that the data ports access with `address` in 0xcf8. `None` if it is not enabled.
fn port_target(address: u32, port: u16) -> Option<Target> {
    (address & 1 << 31 != 0).then_some(Target {
        bus: (address >> 16) as u8,
        slot: (address >> 11) as u8 & 0x1f,
        function: (address >> 8) as u8 & 7,
        offset: (address & 0xfc) as usize + usize::from(port & 3),
    })
}
