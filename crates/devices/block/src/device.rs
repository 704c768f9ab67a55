//! The device as its transport sees it: features, configuration space, activation, saved state.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use zerocopy::IntoBytes;

use crate::SECTOR;
use crate::backend_slot::{BackendSlot, backend_handles};
use crate::config_space::{ConfigSpace, FIELDS, feature};
use crate::control::{BlockControl, check_disk};
use crate::disk::Disk;
use crate::engine::Blocking;
use crate::error::BlockError;
use crate::request::SERIAL_LEN;
use crate::shared::{Limits, LiveState, Shared};
use crate::state::{BlockConfig, BlockState};
use crate::task::{BlockTask, Setup};
use sync::locked;
use virtio::device::{
    ActivateError, Activation, ActiveQueue, ConfigField, Device, DeviceKind, DeviceState, read_bytes,
};
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig};
use virtio::worker::{Nanos, Placement, Task, WorkerId};

/// The virtio block device.
pub struct Block {
    config: BlockConfig,
    read_only: bool,
    flush: bool,
    workers: Vec<WorkerId>,
    queue_sizes: Vec<u16>,
    slots: Vec<Arc<BackendSlot>>,
    shared: Arc<Shared>,
}

impl Block {
    /// A device for `disk` with these rate limits, at the time `now`.
    ///
    /// `workers` are dedicated to it, one for each of its I/O threads: its tasks run there, and may
    /// block on the disk. Without any, the tasks run on shared workers and never block.
    pub fn new(
        config: BlockConfig,
        disk: Disk,
        limits: RateLimiterConfig,
        workers: Vec<WorkerId>,
        now: Nanos,
    ) -> Result<(Self, BlockControl), BlockError> {
        Self::with(config, disk, RateLimiter::new(limits, now), workers, now, (0, false))
    }

    /// A device with a saved state, for `disk`, at the time `now`.
    ///
    /// A disk of another size is allowed: the guest gets a configuration interrupt when it runs.
    pub fn restore(
        state: &BlockState,
        disk: Disk,
        workers: Vec<WorkerId>,
        now: Nanos,
    ) -> Result<(Self, BlockControl), BlockError> {
        state.config.check()?;
        check_disk(&disk, &state.config.id, (state.read_only, state.flush))?;
        let limiter = RateLimiter::restore(&state.limiter, now);
        let resized = disk.size() / SECTOR != state.capacity;
        let generation = state.generation.wrapping_add(resized.into());
        Self::with(state.config.clone(), disk, limiter, workers, now, (generation, resized))
    }

    fn with(
        config: BlockConfig,
        disk: Disk,
        limiter: RateLimiter,
        workers: Vec<WorkerId>,
        now: Nanos,
        (generation, config_changed): (u32, bool),
    ) -> Result<(Self, BlockControl), BlockError> {
        let (read_only, flush) = (disk.is_read_only(), disk.can_flush());
        let blocking = if workers.is_empty() { Blocking::Never } else { Blocking::Allowed };
        let handles = backend_handles(&disk, &config.id, config.io_threads, blocking)?;
        let slots = handles.into_iter().map(BackendSlot::new).collect::<Result<Vec<_>, _>>()?;
        let mut serial = [0; SERIAL_LEN as usize];
        for (to, from) in serial.iter_mut().zip(config.id.bytes()) {
            *to = from;
        }
        let shared = Arc::new(Shared {
            id: config.id.clone(),
            serial,
            stats: Arc::default(),
            limited: AtomicBool::new(!limiter.is_unlimited()),
            limits: Mutex::new(Limits { limiter, now }),
            config_changed: AtomicBool::new(config_changed),
            live: Mutex::new(LiveState { disk, generation, interrupt: None }),
        });
        let control =
            BlockControl { blocking, read_only, flush, slots: slots.clone(), shared: Arc::clone(&shared) };
        let queue_sizes = vec![config.queue_size; usize::from(config.num_queues)];
        Ok((Block { config, read_only, flush, workers, queue_sizes, slots, shared }, control))
    }

    fn config_space(&self, live: &LiveState) -> ConfigSpace {
        ConfigSpace::new(live.disk.size(), self.config.num_queues, self.config.queue_size)
    }
}

impl Device for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let mut features = feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY;
        if self.read_only {
            features |= feature::RO;
        } else {
            features |= feature::DISCARD | feature::WRITE_ZEROES;
        }
        if self.flush {
            features |= feature::FLUSH;
        }
        if self.config.num_queues > 1 {
            features |= feature::MQ;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space(&locked(&self.shared.live));
        read_bytes(space.as_bytes(), offset, data);
    }

    fn config_fields(&self) -> &'static [ConfigField] {
        &FIELDS
    }

    fn config_generation(&self) -> u32 {
        locked(&self.shared.live).generation
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        if activation.queues.first().is_none_or(|first| first.queue.index() != 0) {
            self.shared.stats.activate_fails.add(1);
            return Err(ActivateError::QueueMissing(0));
        }
        let Activation { memory, queues, interrupt, features, .. } = activation;
        let mut dealt: Vec<Vec<ActiveQueue>> = self.slots.iter().map(|_| Vec::new()).collect();
        for queue in queues {
            let slot = usize::from(queue.queue.index()) % self.slots.len();
            dealt[slot].push(queue);
        }
        let mut tasks: Vec<Box<dyn Task>> = Vec::new();
        for (index, (slot, queues)) in self.slots.iter().zip(dealt).enumerate() {
            if queues.is_empty() {
                continue;
            }
            tasks.push(Box::new(BlockTask::new(Setup {
                shared: Arc::clone(&self.shared),
                slot: Arc::clone(slot),
                queues,
                memory: memory.clone(),
                interrupt: Arc::clone(&interrupt),
                read_only: self.read_only,
                write_through: self.flush && features & feature::FLUSH == 0,
                placement: self.workers.get(index).map_or(Placement::Shared, |&id| Placement::On(id)),
            })));
        }
        // Here, and not when the task runs: the device may be saved before that, and the pending
        // interrupt with it.
        if self.shared.config_changed.swap(false, Ordering::AcqRel) {
            interrupt.config();
        }
        locked(&self.shared.live).interrupt = Some(interrupt);
        Ok(tasks)
    }

    fn reset(&mut self) {
        locked(&self.shared.live).interrupt = None;
    }

    fn save(&self) -> DeviceState {
        let live = locked(&self.shared.live);
        let limits = locked(&self.shared.limits);
        DeviceState::of(&BlockState {
            config: self.config.clone(),
            capacity: live.disk.size() / SECTOR,
            read_only: self.read_only,
            flush: self.flush,
            generation: live.generation,
            limiter: limits.limiter.save(limits.now),
        })
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("config", &self.config).finish_non_exhaustive()
    }
}
