//! The front of the device, and how it is changed while it works.
//!
//! # Replacing the disk
//!
//! [`BlockControl::replace`] gives each [lane](super::lane) its part of the new disk, then changes the capacity and interrupts. The
//! old disk is free when [`DiskSwap::wait`] says so.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use config::{CacheType, ConfigError, Drive, check_drive_queues};
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::SECTOR;
use super::config_space::{ConfigSpace, FIELDS, feature};
use super::disk::{Disk, DiskError};
use super::engine::Patience;
use super::lane::{DiskSwap, Lane, parts};
use super::request::SERIAL_LEN;
use super::stats::BlockStats;
use super::task::{BlockTask, Setup};
use sync::locked;
use virtio::device::{
    ActivateError, Activation, ActiveQueue, ConfigField, Device, DeviceData, DeviceKind, DeviceState,
    Interrupt, read_bytes,
};
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterState, RateLimiterUpdate};
use virtio::worker::{Nanos, Placement, Task, WorkerId};

/// Why a block device cannot be made, or its disk not be replaced.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// What serves the disk cannot be made.
    #[error("drive {id}: {source}")]
    Disk {
        /// Which drive.
        id: String,
        /// Why not.
        source: DiskError,
    },
    /// The host has no more event descriptors.
    #[error("cannot make an event descriptor for a disk: {0}")]
    Event(#[source] std::io::Error),
    /// The driver has negotiated something else with the disk before.
    #[error("drive {id}: the disk that the guest knows is {was}, this one is not")]
    Differs {
        /// Which drive.
        id: String,
        /// What the guest relies on.
        was: &'static str,
    },
    /// A saved device that cannot be.
    #[error("the saved state of drive {id} is not possible: {source}")]
    State {
        /// Which drive.
        id: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// Several I/O threads for a disk that only one can serve.
    #[error("drive {id} has an overlay: only one I/O thread can serve it, not {threads}")]
    OverlayThreads {
        /// Which drive.
        id: String,
        /// How many were asked for.
        threads: u16,
    },
}

/// How a block device is cut. Constant for its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Its name, of which the guest reads the first 20 bytes as the serial number.
    pub id: String,
    /// Number of queues, 1 or more.
    pub num_queues: u16,
    /// Descriptors per queue: a power of two.
    pub queue_size: u16,
    /// Number of tasks that the queues are dealt out to, 1 to `num_queues`.
    pub io_threads: u16,
}

impl BlockConfig {
    /// What `drive`, which was checked, asks for.
    pub fn of(drive: &Drive) -> Self {
        BlockConfig {
            id: drive.drive_id.clone(),
            num_queues: drive.num_queues(),
            queue_size: drive.queue_size(),
            io_threads: drive.io_threads(),
        }
    }

    /// Checks one that comes from a file: it is within the bounds of a drive's.
    pub fn check(&self) -> Result<(), BlockError> {
        check_drive_queues(self.num_queues, self.io_threads, self.queue_size)
            .map_err(|source| BlockError::State { id: self.id.clone(), source })
    }
}

/// What a block device saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// How it is cut.
    pub config: BlockConfig,
    /// Sectors that the guest knows the disk to have.
    pub capacity: u64,
    /// Whether the guest cannot write.
    pub read_only: bool,
    /// Whether the guest can flush.
    pub flush: bool,
    /// How often the configuration space changed.
    pub generation: u32,
    /// How far its limits are used up.
    pub limiter: RateLimiterState,
}

impl DeviceData for BlockState {
    const NAME: &'static str = "Block";
}

/// What the front, its tasks and its control share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) serial: [u8; SERIAL_LEN as usize],
    pub(super) stats: BlockStats,
    pub(super) limits: Mutex<Limits>,
    /// Whether there are any: spares the lock where there are none.
    pub(super) limited: AtomicBool,
    /// The configuration space is not what the guest saw before it was saved. The driver is
    /// interrupted when the device is restored.
    pub(super) announce: AtomicBool,
    front: Mutex<Front>,
}

#[derive(Debug)]
pub(super) struct Limits {
    pub(super) limiter: RateLimiter,
    /// The last time that anybody told.
    pub(super) now: Nanos,
}

/// What changes when the disk is replaced, or when the driver comes and goes.
struct Front {
    disk: Disk,
    generation: u32,
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// The front of the device.
pub struct Block {
    config: BlockConfig,
    read_only: bool,
    flush: bool,
    workers: Vec<WorkerId>,
    queue_sizes: Vec<u16>,
    lanes: Vec<Arc<Lane>>,
    shared: Arc<Shared>,
}

/// Changes the device while it works.
#[derive(Debug, Clone)]
pub struct BlockControl {
    patience: Patience,
    read_only: bool,
    flush: bool,
    pub(super) lanes: Vec<Arc<Lane>>,
    shared: Arc<Shared>,
}

impl Block {
    /// A device for `disk` with these limits, at the time `now`.
    ///
    /// `workers` are for it alone, one for each of its I/O threads: its tasks run there, and may wait for the disk. Without any they
    /// run on shared workers and never do.
    pub fn new(
        config: BlockConfig,
        disk: Disk,
        limits: RateLimiterConfig,
        workers: Vec<WorkerId>,
        now: Nanos,
    ) -> Result<(Self, BlockControl), BlockError> {
        Self::with(config, disk, RateLimiter::new(limits, now), workers, now, (0, false))
    }

    /// The device as it was saved, for `disk`, at the time `now`.
    ///
    /// A disk of another size is fine: the guest is told once it runs.
    pub fn restore(
        state: &BlockState,
        disk: Disk,
        workers: Vec<WorkerId>,
        now: Nanos,
    ) -> Result<(Self, BlockControl), BlockError> {
        state.config.check()?;
        let differs = |was| BlockError::Differs { id: state.config.id.clone(), was };
        if disk.is_read_only() != state.read_only {
            return Err(differs(if state.read_only { "read-only" } else { "writable" }));
        }
        if can_flush(&disk) != state.flush {
            return Err(differs(if state.flush { "one that can be flushed" } else { "one without flushes" }));
        }
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
        (generation, announce): (u32, bool),
    ) -> Result<(Self, BlockControl), BlockError> {
        let (read_only, flush) = (disk.is_read_only(), can_flush(&disk));
        let patience = if workers.is_empty() { Patience::None } else { Patience::MayWait };
        let parts = parts(&disk, &config.id, config.io_threads, patience)?;
        let lanes = parts.into_iter().map(Lane::new).collect::<Result<Vec<_>, _>>()?;
        let mut serial = [0; SERIAL_LEN as usize];
        for (to, from) in serial.iter_mut().zip(config.id.bytes()) {
            *to = from;
        }
        let shared = Arc::new(Shared {
            id: config.id.clone(),
            serial,
            stats: BlockStats::default(),
            limited: AtomicBool::new(!limiter.is_unlimited()),
            limits: Mutex::new(Limits { limiter, now }),
            announce: AtomicBool::new(announce),
            front: Mutex::new(Front { disk, generation, interrupt: None }),
        });
        let control =
            BlockControl { patience, read_only, flush, lanes: lanes.clone(), shared: Arc::clone(&shared) };
        let queue_sizes = vec![config.queue_size; usize::from(config.num_queues)];
        Ok((Block { config, read_only, flush, workers, queue_sizes, lanes, shared }, control))
    }

    fn config_space(&self, front: &Front) -> ConfigSpace {
        ConfigSpace::new(front.disk.size(), self.config.num_queues, self.config.queue_size)
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
        let space = self.config_space(&locked(&self.shared.front));
        read_bytes(space.as_bytes(), offset, data);
    }

    fn config_fields(&self) -> &'static [ConfigField] {
        &FIELDS
    }

    fn config_generation(&self) -> u32 {
        locked(&self.shared.front).generation
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        if activation.queues.first().is_none_or(|first| first.queue.index() != 0) {
            self.shared.stats.activate_fails.add(1);
            return Err(ActivateError::QueueMissing(0));
        }
        let Activation { memory, queues, interrupt, features, .. } = activation;
        let mut dealt: Vec<Vec<ActiveQueue>> = self.lanes.iter().map(|_| Vec::new()).collect();
        for queue in queues {
            let lane = usize::from(queue.queue.index()) % self.lanes.len();
            dealt[lane].push(queue);
        }
        let mut tasks: Vec<Box<dyn Task>> = Vec::new();
        for (index, (lane, queues)) in self.lanes.iter().zip(dealt).enumerate() {
            if queues.is_empty() {
                continue;
            }
            tasks.push(Box::new(BlockTask::new(Setup {
                shared: Arc::clone(&self.shared),
                lane: Arc::clone(lane),
                queues,
                memory: memory.clone(),
                interrupt: Arc::clone(&interrupt),
                read_only: self.read_only,
                write_through: self.flush && features & feature::FLUSH == 0,
                placement: self.workers.get(index).map_or(Placement::Shared, |&id| Placement::On(id)),
            })));
        }
        // Here, not when the task runs: a save before that keeps the interrupt pending.
        if self.shared.announce.swap(false, Ordering::AcqRel) {
            interrupt.config();
        }
        locked(&self.shared.front).interrupt = Some(interrupt);
        Ok(tasks)
    }

    fn reset(&mut self) {
        locked(&self.shared.front).interrupt = None;
    }

    fn save(&self) -> DeviceState {
        let front = locked(&self.shared.front);
        let limits = locked(&self.shared.limits);
        DeviceState::of(&BlockState {
            config: self.config.clone(),
            capacity: front.disk.size() / SECTOR,
            read_only: self.read_only,
            flush: self.flush,
            generation: front.generation,
            limiter: limits.limiter.save(limits.now),
        })
    }
}

impl BlockControl {
    /// Whether nothing works with its disk: its workers are paused and have nothing in flight, or the guest does not use it.
    pub fn is_still(&self) -> bool {
        self.lanes.iter().all(|lane| lane.is_parked())
    }

    /// The disk in use.
    pub fn disk(&self) -> Disk {
        locked(&self.shared.front).disk.clone()
    }

    /// What the device counts.
    pub fn stats(&self) -> &BlockStats {
        &self.shared.stats
    }

    /// The limits in force.
    pub fn limits(&self) -> RateLimiterConfig {
        locked(&self.shared.limits).limiter.config()
    }

    /// Changes limits at the time `now`. Requests that wait are looked at again.
    pub fn update_limits(&self, update: RateLimiterUpdate, now: Nanos) {
        let mut limits = locked(&self.shared.limits);
        limits.limiter.update(update, now);
        limits.now = now;
        self.shared.limited.store(!limits.limiter.is_unlimited(), Ordering::Release);
        drop(limits);
        self.shared.stats.update_count.add(1);
        self.lanes.iter().for_each(|lane| lane.event.signal());
    }

    /// Goes on with `disk`. The guest sees its capacity at once.
    ///
    /// On an error nothing has changed. A disk with an overlay must not be the one in use, which has it locked.
    pub fn replace(&self, disk: Disk) -> Result<DiskSwap, BlockError> {
        let differs = |was| BlockError::Differs { id: self.shared.id.clone(), was };
        if disk.is_read_only() != self.read_only {
            return Err(differs(if self.read_only { "read-only" } else { "writable" }));
        }
        if can_flush(&disk) != self.flush {
            return Err(differs(if self.flush { "one that can be flushed" } else { "one without flushes" }));
        }
        let parts = parts(&disk, &self.shared.id, self.lanes.len() as u16, self.patience)?;
        // The lanes first: a request for the new capacity must not meet the old disk.
        let old = self.lanes.iter().zip(parts).map(|(lane, part)| lane.post(part)).collect();
        let mut front = locked(&self.shared.front);
        let old_disk = std::mem::replace(&mut front.disk, disk);
        front.generation = front.generation.wrapping_add(1);
        if let Some(interrupt) = &front.interrupt {
            interrupt.config();
        }
        drop(front);
        self.shared.stats.update_count.add(1);
        Ok(DiskSwap::new(old_disk, old))
    }
}

/// Whether the guest is offered flushes.
fn can_flush(disk: &Disk) -> bool {
    disk.cache_type() == CacheType::Writeback
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("config", &self.config).finish_non_exhaustive()
    }
}
