//! The part that both transports share: device status, features, queues (2.1 to 2.4, 3.1).

use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::GuestRam;
use serde::{Deserialize, Serialize};

use super::device_status::{DeviceStatus, Status};
use super::{Attachment, Resetting, RestoreError};
use crate::device::{Activation, ActiveQueue, Device, DeviceState, Interrupt, feature};
use crate::queue::{Queue, QueueError, QueueProgress, QueueState};
use crate::worker::{TaskHandle, Workers};
use sync::EventFd;

/// The saved state that both transports share, with that of the device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommonState {
    /// Bits of [`Status`].
    pub status: u8,
    /// The features that the driver accepted.
    pub driver_features: u64,
    /// The selected half of the device features.
    pub device_feature_select: u32,
    /// The selected half of the driver features.
    pub driver_feature_select: u32,
    /// The selected queue.
    pub queue_select: u16,
    /// All queues.
    pub queues: Vec<QueueState>,
    /// The generation of the configuration space.
    pub config_generation: u32,
    /// The device's own state.
    pub device: DeviceState,
}

/// The set-up of one queue by the driver.
struct QueueSetup {
    max_size: u16,
    state: QueueState,
    kick: Arc<EventFd>,
    /// The progress of the task that serves the queue.
    progress: Arc<QueueProgress>,
}

impl QueueSetup {
    fn new(max_size: u16) -> std::io::Result<Self> {
        let (kick, progress) = (Arc::new(EventFd::new()?), Arc::default());
        Ok(QueueSetup { max_size, state: fresh(max_size), kick, progress })
    }
}

/// A queue that was not set up.
fn fresh(size: u16) -> QueueState {
    QueueState { size, ready: false, desc_table: 0, avail_ring: 0, used_ring: 0, next_avail: 0, next_used: 0 }
}

/// The areas of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Area {
    /// Descriptor table.
    Descriptors,
    /// Available ring.
    Driver,
    /// Used ring.
    Device,
}

/// A half of a 64-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddrHalf {
    Low,
    High,
}

/// Status, features, queues and device.
pub(super) struct TransportCore {
    pub(super) device_status: Arc<DeviceStatus>,
    interrupt: Arc<dyn Interrupt>,
    device: Box<dyn Device>,
    memory: GuestRam,
    workers: Workers,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u16,
    driver_features: u64,
    queues: Vec<QueueSetup>,
    /// Added to the device's generation, so that a restored device has a new one.
    generation_base: u32,
    tasks: Vec<TaskHandle>,
    /// The device is active, or a reset of it has not completed.
    activated: bool,
    /// A reset that has not completed.
    resetting: Option<Resetting>,
}

impl TransportCore {
    pub(super) fn new(
        attachment: Attachment,
        device_status: Arc<DeviceStatus>,
        interrupt: Arc<dyn Interrupt>,
    ) -> std::io::Result<Self> {
        let Attachment { device, memory, workers, .. } = attachment;
        let queues =
            device.queue_sizes().iter().map(|&size| QueueSetup::new(size)).collect::<Result<_, _>>()?;
        Ok(TransportCore {
            device_status,
            interrupt,
            device,
            memory,
            workers,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            driver_features: 0,
            queues,
            generation_base: 0,
            tasks: Vec::new(),
            activated: false,
            resetting: None,
        })
    }

    pub(super) fn device(&self) -> &dyn Device {
        self.device.as_ref()
    }

    /// How often the device needed a reset.
    pub(super) fn broken_count(&self) -> u64 {
        self.device_status.broken_count()
    }

    /// All offered feature bits.
    pub(super) fn offered(&self) -> u64 {
        self.device.features() | feature::VERSION_1 | feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC
    }

    /// The selected half of the offered features.
    pub(super) fn device_features(&self) -> u32 {
        half_of(self.offered(), self.device_feature_select)
    }

    /// The selected half of the accepted features.
    pub(super) fn driver_features(&self) -> u32 {
        half_of(self.driver_features, self.driver_feature_select)
    }

    /// Sets the selected half of the accepted features. Only before `FEATURES_OK` (3.1.1).
    pub(super) fn set_driver_features(&mut self, value: u32) {
        if self.status() & Status::FEATURES_OK == 0 {
            self.driver_features = match self.driver_feature_select {
                0 => self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                // Bits that do not exist. The driver notices at FEATURES_OK.
                _ if value != 0 => u64::MAX,
                _ => self.driver_features,
            };
        }
    }

    pub(super) fn status(&self) -> u8 {
        self.device_status.status()
    }

    /// Whether register writes have an effect: not during a reset.
    pub(super) fn is_resetting(&self) -> bool {
        self.resetting.is_some()
    }

    /// The reset that has not completed.
    pub(super) fn resetting(&self) -> Option<Resetting> {
        self.resetting.clone()
    }

    /// Handles a write of the status. 0 begins a reset, which [`TransportCore::finish_reset`]
    /// completes.
    pub(super) fn set_status(&mut self, value: u8) {
        if value == 0 {
            if self.resetting.is_none() {
                self.resetting = Some(Resetting::begin(self.tasks.drain(..)));
            }
            return;
        }
        // Each bit only after the one before (3.1.1). Bits that the driver leaves out stay set.
        for (bit, needs) in [
            (Status::ACKNOWLEDGE, 0),
            (Status::DRIVER, Status::ACKNOWLEDGE),
            (Status::FEATURES_OK, Status::DRIVER),
            (Status::DRIVER_OK, Status::FEATURES_OK),
            (Status::FAILED, 0),
        ] {
            let status = self.status();
            if value & bit == 0 || status & bit != 0 || status & needs != needs {
                continue;
            }
            if bit == Status::FEATURES_OK && !self.features_fit() {
                continue;
            }
            self.device_status.add_status(bit);
            if bit == Status::DRIVER_OK {
                self.activate();
            }
        }
    }

    /// Whether the driver accepted only offered features.
    ///
    /// A driver must accept `VERSION_1` too, but those of some unikernels do not. For them the
    /// device behaves the same: registers, rings and the 12-byte header of a network frame are
    /// those of version 1, and x86 is little-endian either way.
    fn features_fit(&self) -> bool {
        self.driver_features & !self.offered() == 0
    }

    /// The number of queues.
    pub(super) fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The set-up and the largest size of the selected queue, if it exists.
    pub(super) fn selected(&self) -> Option<(&QueueState, u16)> {
        self.queues.get(usize::from(self.queue_select)).map(|queue| (&queue.state, queue.max_size))
    }

    /// Changes the set-up of the selected queue. Only between `FEATURES_OK` and `DRIVER_OK`
    /// (3.1.1).
    fn set_up(&mut self, change: impl FnOnce(&mut QueueState)) {
        let status = self.status();
        if status & Status::FEATURES_OK == 0 || status & Status::DRIVER_OK != 0 || self.is_resetting() {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
            change(&mut queue.state);
        }
    }

    /// Sets the size of the selected queue.
    pub(super) fn set_queue_size(&mut self, size: u16) {
        self.set_up(|queue| {
            if !queue.ready {
                queue.size = size;
            }
        });
    }

    /// Enables or (before `DRIVER_OK`) disables the selected queue.
    pub(super) fn set_queue_ready(&mut self, ready: bool) {
        self.set_up(|queue| queue.ready = ready);
    }

    /// Sets half of the address of an area of the selected queue.
    pub(super) fn set_queue_addr(&mut self, area: Area, half: AddrHalf, value: u32) {
        self.set_up(|queue| {
            if queue.ready {
                return;
            }
            let addr = match area {
                Area::Descriptors => &mut queue.desc_table,
                Area::Driver => &mut queue.avail_ring,
                Area::Device => &mut queue.used_ring,
            };
            *addr = match half {
                AddrHalf::Low => *addr & !0xffff_ffff | u64::from(value),
                AddrHalf::High => *addr & 0xffff_ffff | u64::from(value) << 32,
            };
        });
    }

    /// Handles a kick that came as a register write and not through an ioeventfd.
    pub(super) fn kick(&self, index: u32) {
        if self.status() & Status::DRIVER_OK != 0
            && let Some(queue) = self.queues.get(index as usize)
        {
            queue.kick.signal();
        }
    }

    /// The kick eventfds of the queues, in order.
    pub(super) fn kicks(&self) -> impl Iterator<Item = &Arc<EventFd>> {
        self.queues.iter().map(|queue| &queue.kick)
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.generation_base.wrapping_add(self.device.config_generation())
    }

    /// Reads the configuration space. Fields of other features than the driver's are 0
    /// ([`ConfigField`]).
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
        let offered = self.offered();
        let accepted = self.driver_features & offered;
        let negotiated = self.status() & Status::FEATURES_OK != 0;
        for field in self.device.config_fields() {
            let features = if negotiated || field.hint { accepted } else { offered };
            if features & field.feature == 0 {
                field.clear(offset, data);
            }
        }
    }

    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if !self.is_resetting() {
            self.device.write_config(offset, data);
        }
    }

    /// Activates the device at `DRIVER_OK`. If that fails, the device needs a reset.
    fn activate(&mut self) {
        if let Err(error) = self.try_activate(false) {
            self.interrupt.needs_reset(&error);
        }
    }

    fn try_activate(&mut self, restored: bool) -> Result<(), RestoreError> {
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, setup) in (0u16..).zip(&self.queues) {
            if setup.state.ready {
                let progress = Arc::clone(&setup.progress);
                let made = Queue::new(
                    index,
                    setup.max_size,
                    &setup.state,
                    self.driver_features,
                    &self.memory,
                    progress,
                );
                let queue = made.map_err(|source| self.queue_error(index, source))?;
                queues.push(ActiveQueue { queue, kick: Arc::clone(&setup.kick) });
            }
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: Arc::clone(&self.interrupt),
            features: self.driver_features,
            restored,
        };
        let tasks = self.device.activate(activation).map_err(|source| RestoreError::Activate {
            name: self.device_status.name().to_owned(),
            source,
        })?;
        self.activated = true;
        self.tasks =
            tasks.into_iter().map(|task| self.workers.add(task, Arc::clone(&self.interrupt))).collect();
        Ok(())
    }

    fn queue_error(&self, index: u16, source: QueueError) -> RestoreError {
        RestoreError::Queue { name: self.device_status.name().to_owned(), index, source }
    }

    /// Completes a reset whose tasks have drained. Returns false if one has not drained.
    pub(super) fn finish_reset(&mut self) -> bool {
        if let Some(resetting) = &self.resetting {
            if !resetting.is_done() {
                return false;
            }
            self.resetting = None;
            if std::mem::take(&mut self.activated) {
                self.device.reset();
            }
            for queue in &mut self.queues {
                queue.state = fresh(queue.max_size);
            }
            (self.driver_features, self.queue_select) = (0, 0);
            (self.device_feature_select, self.driver_feature_select) = (0, 0);
            self.device_status.set_status(0);
        }
        true
    }

    /// Begins a reset, and waits until nothing is in flight, for at most `timeout`.
    pub(super) fn drain(&mut self, timeout: Duration) {
        self.set_status(0);
        if let Some(resetting) = &self.resetting
            && let Some(deadline) = Instant::now().checked_add(timeout)
        {
            resetting.wait_until(deadline);
        }
    }

    /// Returns the state. The workers are paused, and no reset is in progress.
    pub(super) fn save(&self) -> CommonState {
        let queues = self.queues.iter().map(|queue| {
            let (next_avail, next_used) = queue.progress.get();
            if self.activated { QueueState { next_avail, next_used, ..queue.state } } else { queue.state }
        });
        CommonState {
            status: self.status(),
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            queues: queues.collect(),
            config_generation: self.config_generation(),
            device: self.device.save(),
        }
    }

    /// Restores a new transport from `state`, and activates the device if it was active.
    /// `config_pending`: the driver may not have handled the last configuration-change interrupt,
    /// so it is raised again.
    pub(super) fn restore(&mut self, state: &CommonState, config_pending: bool) -> Result<(), RestoreError> {
        let name = || self.device_status.name().to_owned();
        if state.queues.len() != self.queues.len() {
            return Err(RestoreError::Queues {
                name: name(),
                has: self.queues.len(),
                saved: state.queues.len(),
            });
        }
        let negotiated = state.status & Status::FEATURES_OK != 0;
        let missing = state.driver_features & !self.offered();
        if negotiated && missing != 0 {
            return Err(RestoreError::Features { name: name(), missing });
        }
        let running = state.status & Status::DRIVER_OK != 0;
        if running && !negotiated {
            return Err(RestoreError::Impossible { name: name(), what: "it runs without features" });
        }
        self.driver_features = state.driver_features;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        // A driver that was reading the configuration space when it was saved reads it again.
        self.generation_base =
            state.config_generation.wrapping_add(1).wrapping_sub(self.device.config_generation());
        for (queue, state) in self.queues.iter_mut().zip(&state.queues) {
            queue.state = *state;
        }
        self.device_status.set_status(state.status);
        if running && state.status & Status::DEVICE_NEEDS_RESET == 0 {
            self.try_activate(true)?;
            // An interrupt in flight at the save is in no state. A spurious one does no harm.
            for (index, _) in (0u16..).zip(&self.queues).filter(|(_, queue)| queue.state.ready) {
                self.interrupt.queue(index);
            }
        }
        // Also for a device that needs a reset: the interrupt tells its driver.
        if running && config_pending {
            self.interrupt.config();
        }
        Ok(())
    }
}

/// The low (0) or high (1) half of 64 feature bits. Other halves are 0.
fn half_of(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}
