//! The network device as its transport sees it: features, configuration space, activation, state.

use std::fmt;
use std::sync::Arc;

use zerocopy::IntoBytes;

use crate::backend::tap::Tap;
use crate::backend::{BackendKind, Link, NetBackend};
use crate::backend_slot::{BackendParts, BackendSlot};
use crate::config_space::{ANNOUNCE, ConfigSpace, FIELDS, LINK_UP, feature};
use crate::control_queue::ControlTask;
use crate::error::NetError;
use crate::interceptor::FrameInterceptor;
use crate::pair::{PairSetup, PairTask};
use crate::rtnl_budget::RtnlBudget;
use crate::shared::{LiveState, Shared, SharedSetup};
use crate::shared_limiter::SharedLimiter;
use crate::state::{NetConfig, NetState};
use crate::stats::NetStats;
use crate::vhost_task::{VhostSetup, VhostTask};
use virtio::device::{
    ActivateError, Activation, ActiveQueue, ConfigField, Device, DeviceKind, DeviceState, read_bytes,
};
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterUpdate};
use virtio::worker::{Nanos, Task};

/// A network device.
pub struct Net {
    config: NetConfig,
    features: u64,
    queue_sizes: Vec<u16>,
    /// The backend of each queue pair.
    slots: Vec<Arc<BackendSlot>>,
    /// The tap that the kernel's vhost-net serves. None: io workers serve the queue pairs.
    vhost_tap: Option<Arc<Tap>>,
    shared: Arc<Shared>,
}

/// Reads the statistics and changes the rate limits of a running network device.
#[derive(Clone)]
pub struct NetControl {
    shared: Arc<Shared>,
}

/// What a network device is connected to.
pub struct NetSetup {
    /// The network backend.
    pub backend: NetBackend,
    /// A service that replies to some of the guest's frames.
    pub interceptor: Option<Box<dyn FrameInterceptor>>,
}

impl Net {
    /// Creates a device with these rate limits. `now` is the current time.
    pub fn new(
        config: NetConfig,
        setup: NetSetup,
        rx_limits: RateLimiterConfig,
        tx_limits: RateLimiterConfig,
        now: Nanos,
    ) -> Result<(Self, NetControl), NetError> {
        let limiters = [rx_limits, tx_limits].map(|limits| RateLimiter::new(limits, now));
        let features = features(&config, &setup.backend);
        Self::with(config, setup, features, limiters, LiveState::new(), now)
    }

    /// Restores a device from its saved state, with another backend and, if `mac` is set, with
    /// another MAC address. `now` is the current time.
    ///
    /// The device offers its saved features, as far as the new backend supports them. Whether they
    /// are enough for the driver is checked when the transport restores the driver's features. The
    /// guest is asked to announce itself if its driver can, because its place in the network has
    /// changed.
    pub fn restore(
        state: &NetState,
        mac: Option<[u8; 6]>,
        setup: NetSetup,
        now: Nanos,
    ) -> Result<(Self, NetControl), NetError> {
        let config = NetConfig { mac: mac.or(state.config.mac), ..state.config.clone() };
        let has_new_mac = config.mac != state.config.mac;
        let mut former_macs = state.former_macs.clone();
        if has_new_mac {
            // The address that the driver read first, and the one that it may have read since.
            former_macs.truncate(1);
            former_macs.push(state.config.mac);
        }
        let added = if has_new_mac { feature::MAC } else { 0 };
        let features = (state.features | added) & features(&config, &setup.backend);
        let limiters =
            [&state.rx_limiter, &state.tx_limiter].map(|limiter| RateLimiter::restore(limiter, now));
        let announce = state.can_announce;
        let live = LiveState {
            announce,
            can_announce: announce,
            generation: state.generation.wrapping_add(1),
            active_pairs: state.active_pairs.clamp(1, state.config.pairs.max(1)),
            offloads: state.offloads,
            former_macs,
            ..LiveState::new()
        };
        let (device, control) = Self::with(config, setup, features, limiters, live, now)?;
        let changed = announce || has_new_mac || control.link_is_up() != state.link_up;
        control.shared.set_config_changed(changed);
        Ok((device, control))
    }

    fn with(
        config: NetConfig,
        setup: NetSetup,
        features: u64,
        [rx, tx]: [RateLimiter; 2],
        mut live: LiveState,
        now: Nanos,
    ) -> Result<(Self, NetControl), NetError> {
        let NetSetup { backend, interceptor } = setup;
        live.link_up &= interceptor.is_some() || !matches!(backend.kind, BackendKind::Unplugged(_));
        let id = || config.id.clone();
        if backend.pairs() != usize::from(config.pairs) {
            return Err(NetError::Pairs { id: id(), wanted: config.pairs, has: backend.pairs() });
        }
        if backend.is_vhost() {
            if interceptor.is_some() {
                return Err(NetError::Vhost { id: id(), what: "the metadata service" });
            }
            if !rx.is_unlimited() || !tx.is_unlimited() {
                return Err(NetError::Vhost { id: id(), what: "a rate limiter" });
            }
        }
        let SplitBackend { tap, vhost_tap, mut parts } = split_backend(backend, &config.id)?;
        let has_interceptor = interceptor.is_some();
        if let Some(first) = parts.first_mut() {
            first.interceptor = interceptor;
        }
        let shared = Arc::new(Shared::new(SharedSetup {
            id: config.id.clone(),
            rx_limiter: SharedLimiter::new(rx, now),
            tx_limiter: SharedLimiter::new(tx, now),
            tap,
            pairs: config.pairs,
            has_interceptor,
            rtnl_budget: RtnlBudget::new(now),
            live,
        }));
        let control = NetControl { shared: Arc::clone(&shared) };
        // Two queues for each pair, and the control queue.
        let queue_sizes = vec![config.queue_size; 2 * usize::from(config.pairs) + 1];
        let slots = parts.into_iter().map(|parts| Arc::new(BackendSlot::new(parts))).collect();
        Ok((Net { config, features, queue_sizes, slots, vhost_tap, shared }, control))
    }

    fn config_space(&self, live: &LiveState) -> ConfigSpace {
        let link = if live.link_up { LINK_UP } else { 0 };
        let announce = if live.announce { ANNOUNCE } else { 0 };
        ConfigSpace {
            mac: self.config.mac.unwrap_or_default(),
            status: (link | announce).into(),
            max_virtqueue_pairs: self.config.pairs.into(),
            mtu: self.config.mtu.unwrap_or_default().into(),
        }
    }

    /// Creates the tasks of the queue pairs and of the control queue.
    fn tasks(
        &self,
        activation: Activation,
        allowed_src_macs: &[[u8; 6]],
    ) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let Activation { memory, queues: active, interrupt, features, .. } = activation;
        let mut queues: Vec<Option<ActiveQueue>> = self.queue_sizes.iter().map(|_| None).collect();
        for queue in active {
            let index = usize::from(queue.queue.index());
            queues[index] = Some(queue);
        }
        let pairs = if features & feature::MQ == 0 { 1 } else { self.slots.len() };
        let mut tasks: Vec<Box<dyn Task>> = Vec::new();
        for (pair, slot) in self.slots[..pairs].iter().enumerate() {
            let (rx, tx) = (queues[2 * pair].take(), queues[2 * pair + 1].take());
            let (Some(rx), Some(tx)) = (rx, tx) else {
                if pair == 0 {
                    return Err(ActivateError::QueueMissing(0));
                }
                // The driver does not use this pair.
                continue;
            };
            let (shared, slot) = (Arc::clone(&self.shared), Arc::clone(slot));
            let (memory, interrupt) = (memory.clone(), Arc::clone(&interrupt));
            match &self.vhost_tap {
                None => {
                    let allowed_src_macs = allowed_src_macs.to_vec();
                    tasks.push(Box::new(PairTask::new(PairSetup {
                        shared,
                        slot,
                        rx,
                        tx,
                        memory,
                        interrupt,
                        features,
                        allowed_src_macs,
                    })));
                }
                Some(tap) => {
                    let (queues, tap) = ([rx, tx], Arc::clone(tap));
                    let setup = VhostSetup { shared, slot, queues, memory, interrupt, features, tap, pair };
                    let task = VhostTask::new(setup)
                        .map_err(|source| ActivateError::Host { doing: "create an eventfd", source })?;
                    tasks.push(Box::new(task));
                }
            }
        }
        if features & feature::CTRL_VQ != 0
            && let Some(queue) = queues[2 * pairs].take()
        {
            let shared = Arc::clone(&self.shared);
            tasks.push(Box::new(ControlTask::new(shared, queue, memory, interrupt, features)));
        }
        Ok(tasks)
    }
}

/// A backend, split into what the device and its queue pairs need.
struct SplitBackend {
    tap: Option<Arc<Tap>>,
    vhost_tap: Option<Arc<Tap>>,
    /// One for each queue pair.
    parts: Vec<BackendParts>,
}

fn split_backend(backend: NetBackend, id: &str) -> Result<SplitBackend, NetError> {
    let of_link = |link| BackendParts { link: Some(link), ..BackendParts::default() };
    let of_vhost = |vhost| BackendParts { vhost: Some(vhost), ..BackendParts::default() };
    Ok(match backend.kind {
        BackendKind::Tap(tap) => {
            let parts = (0..tap.queues()).map(|queue| of_link(Link::Tap(Arc::clone(&tap), queue))).collect();
            SplitBackend { tap: Some(tap), vhost_tap: None, parts }
        }
        BackendKind::Vhost(tap, vhosts) => {
            for vhost in &vhosts {
                vhost.claim().map_err(|source| NetError::VhostClaim { id: id.to_owned(), source })?;
            }
            let parts = vhosts.into_iter().map(of_vhost).collect();
            SplitBackend { tap: Some(Arc::clone(&tap)), vhost_tap: Some(tap), parts }
        }
        BackendKind::Unplugged(pairs) => SplitBackend {
            tap: None,
            vhost_tap: None,
            parts: (0..pairs).map(|_| BackendParts::default()).collect(),
        },
        BackendKind::Stream(stream) => {
            SplitBackend { tap: None, vhost_tap: None, parts: vec![of_link(Link::Stream(stream))] }
        }
    })
}

/// Source MAC addresses that a guest may use, from its MAC and its former ones. Empty: any.
fn allowed_src_macs(mac: Option<[u8; 6]>, former: &[Option<[u8; 6]>]) -> Vec<[u8; 6]> {
    former.iter().copied().chain([mac]).collect::<Option<_>>().unwrap_or_default()
}

/// Features that a device with this configuration and backend offers.
fn features(config: &NetConfig, backend: &NetBackend) -> u64 {
    let mut features = backend.features() | feature::STATUS | feature::CTRL_VQ | feature::GUEST_ANNOUNCE;
    if features & feature::GUEST_CSUM != 0 {
        features |= feature::CTRL_GUEST_OFFLOADS;
    }
    if config.mac.is_some() {
        features |= feature::MAC;
    }
    if config.mtu.is_some() {
        features |= feature::MTU;
    }
    if config.pairs > 1 {
        features |= feature::MQ;
    }
    features
}

impl Device for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space(&self.shared.live());
        read_bytes(space.as_bytes(), offset, data);
    }

    fn config_fields(&self) -> &'static [ConfigField] {
        &FIELDS
    }

    fn config_generation(&self) -> u32 {
        self.shared.live().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let (interrupt, features) = (Arc::clone(&activation.interrupt), activation.features);
        let kicks = activation.queues.iter().map(|queue| Arc::clone(&queue.kick)).collect();
        let restored = activation.restored;
        let former = if restored { self.shared.live().former_macs.clone() } else { Vec::new() };
        let allowed = allowed_src_macs(self.config.mac, &former);
        let tasks = self.tasks(activation, &allowed).inspect_err(|_| {
            self.shared.stats.activate_fails.add(1);
        })?;
        let mut live = self.shared.live();
        // The tasks apply these settings to the tap: this thread must not block.
        let offloads = if restored { live.offloads } else { u64::MAX };
        live.offloads = offloads & features & feature::GUEST_OFFLOADS;
        if !restored || features & feature::MQ == 0 {
            live.active_pairs = 1;
        }
        live.former_macs = former;
        live.can_announce = features & feature::GUEST_ANNOUNCE != 0;
        live.interrupt = Some(interrupt);
        live.kicks = kicks;
        // Here and not in a task, so that a save before a task runs keeps the interrupt pending.
        if self.shared.take_config_changed() && restored {
            live.notify_config_change();
        }
        Ok(tasks)
    }

    fn reset(&mut self) {
        let mut live = self.shared.live();
        live.interrupt = None;
        live.kicks.clear();
        live.announce = false;
        live.can_announce = false;
        drop(live);
        for slot in &self.slots {
            let mut parts = slot.take();
            if let Some(interceptor) = &mut parts.interceptor {
                interceptor.reset();
            }
            slot.put(parts);
        }
    }

    fn save(&self) -> DeviceState {
        let live = self.shared.live();
        DeviceState::of(&NetState {
            config: self.config.clone(),
            features: self.features,
            active_pairs: live.active_pairs,
            offloads: live.offloads,
            link_up: live.link_up,
            can_announce: live.can_announce,
            generation: live.generation,
            former_macs: live.former_macs.clone(),
            rx_limiter: self.shared.rx_limiter.save(),
            tx_limiter: self.shared.tx_limiter.save(),
        })
    }
}

impl NetControl {
    /// Counters of the device.
    pub fn stats(&self) -> &Arc<NetStats> {
        &self.shared.stats
    }

    /// Whether the link is up.
    pub fn link_is_up(&self) -> bool {
        self.shared.live().link_up
    }

    /// The current rate limits: of frames to the guest, and of frames from the guest.
    pub fn limits(&self) -> [RateLimiterConfig; 2] {
        [self.shared.rx_limiter.config(), self.shared.tx_limiter.config()]
    }

    /// Changes the rate limits at the time `now`. Delayed frames are checked against the new
    /// limits.
    pub fn update_limits(&self, rx: RateLimiterUpdate, tx: RateLimiterUpdate, now: Nanos) {
        self.shared.rx_limiter.update(rx, now);
        self.shared.tx_limiter.update(tx, now);
        self.shared.stats.update_count.add(1);
        self.shared.live().kicks.iter().for_each(|kick| kick.signal());
    }
}

#[cfg(test)]
impl NetControl {
    /// The tap that an io worker serves.
    pub(crate) fn tap(&self) -> &Tap {
        self.shared.tap()
    }
}

impl fmt::Debug for NetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetControl").field("id", &self.shared.id).finish_non_exhaustive()
    }
}
