//! The front of the device, and how it is changed while it works.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use config::NetworkInterface;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::backend::{Kind, Link, NetBackend};
use super::call_budget::CallBudget;
use super::config_space::{ANNOUNCE, ConfigSpace, FIELDS, LINK_UP, feature};
use super::ctrl::CtrlTask;
use super::interceptor::FrameInterceptor;
use super::limits::Limits;
use super::port::{Parts, Port};
use super::stats::NetStats;
use super::tap::{Tap, is_gone};
use super::task::{self, PairTask};
use super::vhost::VhostError;
use super::vhost_task::{self, VhostTask};
use sync::Counter;
use sync::EventFd;
use sync::locked;
use virtio::device::{
    ActivateError, Activation, ActiveQueue, ConfigField, Device, DeviceData, DeviceKind, DeviceState,
    Interrupt, read_bytes,
};
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig, RateLimiterState, RateLimiterUpdate};
use virtio::worker::{Nanos, Task};

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The back end has another number of queues.
    #[error("network interface {id} is to have {wanted} pairs of queues, and its network has {has}")]
    Pairs {
        /// Which interface.
        id: String,
        /// How many it is to have.
        wanted: u16,
        /// How many the back end has.
        has: usize,
    },
    /// The kernel does not serve it.
    #[error("network interface {id}: {source}")]
    VhostRefuses {
        /// Which interface.
        id: String,
        /// Why.
        source: VhostError,
    },
    /// Something has to see each frame, and the kernel moves them.
    #[error("network interface {id} has the back end vhost: {what} cannot be had with it")]
    Vhost {
        /// Which interface.
        id: String,
        /// What needs to see frames.
        what: &'static str,
    },
}

/// How a network device is cut. Constant for its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its name.
    pub id: String,
    /// The guest's address; where there is none, the guest chooses.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the guest is told.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 or more.
    pub pairs: u16,
    /// Descriptors per queue: a power of two.
    pub queue_size: u16,
}

impl NetConfig {
    /// What `network`, which was checked, asks for.
    pub fn of(network: &NetworkInterface) -> Self {
        NetConfig {
            id: network.iface_id.clone(),
            mac: network.guest_mac.map(|mac| mac.0),
            mtu: network.mtu,
            pairs: network.num_queues(),
            queue_size: network.queue_size(),
        }
    }
}

/// What a network device saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// How it is cut.
    pub config: NetConfig,
    /// The features that it offers.
    pub features: u64,
    /// Pairs of queues in use.
    pub active_pairs: u16,
    /// What is left to the guest: feature bits.
    pub offloads: u64,
    /// Whether the guest has a network.
    pub link_up: bool,
    /// Whether the driver understands that it is to announce itself.
    pub can_announce: bool,
    /// How often the configuration space changed.
    pub generation: u32,
    /// Addresses that the guest had before its present one, which a driver that runs may go on using: the first of them and the last.
    /// None: it had none, and chose its own.
    #[serde(default)]
    pub former_macs: Vec<Option<[u8; 6]>>,
    /// How far the limits on what the guest receives are used up.
    pub rx_limiter: RateLimiterState,
    /// How far the limits on what it sends are used up.
    pub tx_limiter: RateLimiterState,
}

impl DeviceData for NetState {
    const NAME: &'static str = "Net";
}

/// What the front, its tasks and its control share.
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) stats: NetStats,
    pub(super) rx_limits: Limits,
    pub(super) tx_limits: Limits,
    /// The tap whose queues and offloads can be set.
    tap: Option<Arc<Tap>>,
    pairs: u16,
    /// Something answers the guest even where there is no network.
    has_detour: bool,
    /// Times that the kernel refused what the driver wanted.
    refusals: Counter,
    /// Held from what the driver wants to what the kernel was told: several tasks may be at it.
    asking: Mutex<CallBudget>,
    /// The configuration space is not what the guest saw before it was saved. The driver is
    /// interrupted when the device is restored.
    changed: AtomicBool,
    front: Mutex<Front>,
}

/// What changes while the device works.
struct Front {
    link_up: bool,
    announce: bool,
    can_announce: bool,
    generation: u32,
    active_pairs: u16,
    offloads: u64,
    /// See [`NetState`].
    former_macs: Vec<Option<[u8; 6]>>,
    interrupt: Option<Arc<dyn Interrupt>>,
    /// Wake the tasks.
    kicks: Vec<Arc<EventFd>>,
}

impl Shared {
    /// The network is gone. The link stays up for who answers in its place: a guest sends nothing over one that is down.
    pub(super) fn link_down(&self, why: &dyn fmt::Display) {
        if self.has_detour {
            log::warn!("network interface {}: only the metadata service is left: {why}", self.id);
            return;
        }
        let mut front = locked(&self.front);
        if std::mem::replace(&mut front.link_up, false) {
            log::warn!("network interface {}: the link is down: {why}", self.id);
            front.changed();
        }
    }

    /// The driver has announced itself.
    pub(super) fn announced(&self) {
        locked(&self.front).announce = false;
    }

    /// The driver wants to use so many pairs of queues. `Ok(false)` if it cannot; an error says
    /// when to ask again.
    pub(super) fn use_pairs(&self, pairs: u16, now: Nanos) -> Result<bool, Nanos> {
        if !(1..=self.pairs).contains(&pairs) {
            return Ok(false);
        }
        let mut budget = locked(&self.asking);
        if let Some(tap) = &self.tap {
            budget.take(tap.changes(None, Some(pairs.into())), now)?;
        }
        let done = self.tap.as_ref().map_or(Ok(()), |tap| tap.use_queues(pairs.into()));
        Ok(self.ask("change the number of queues", done) && {
            locked(&self.front).active_pairs = pairs;
            true
        })
    }

    /// The driver takes what these features leave to it. `Ok(false)` if the kernel refuses; an
    /// error says when to ask again.
    pub(super) fn set_offloads(&self, offloads: u64, now: Nanos) -> Result<bool, Nanos> {
        let mut budget = locked(&self.asking);
        if let Some(tap) = &self.tap {
            budget.take(tap.changes(Some(offloads), None), now)?;
        }
        let done = self.tap.as_ref().map_or(Ok(()), |tap| tap.set_offloads(offloads));
        Ok(self.ask("change the offloads", done) && {
            locked(&self.front).offloads = offloads;
            true
        })
    }

    /// Gives the tap the driver's offloads and number of queues. An error says when to ask again;
    /// until then no frame may be received, which could be larger than the driver takes.
    pub(super) fn tell_tap(&self, now: Nanos) -> Result<(), Nanos> {
        let Some(tap) = &self.tap else { return Ok(()) };
        let mut budget = locked(&self.asking);
        let (offloads, pairs) = {
            let front = locked(&self.front);
            (front.offloads, front.active_pairs)
        };
        budget.take(tap.changes(Some(offloads), Some(pairs.into())), now)?;
        for (what, done) in [
            ("set the offloads", tap.set_offloads(offloads)),
            ("set the number of queues", tap.use_queues(pairs.into())),
        ] {
            match done {
                // It may just have been deleted: the guest sees a network without a link, not a dead device.
                Err(error) if is_gone(error) => self.link_down(&format_args!("{}: {error}", tap.name())),
                done => _ = self.ask(what, done),
            }
        }
        Ok(())
    }

    /// Whether a tap may be asked now whether it is still there, which takes RTNL, too. An error
    /// says when to ask again.
    pub(super) fn may_look(&self, now: Nanos) -> Result<(), Nanos> {
        locked(&self.asking).take(1, now)
    }

    /// Says it where the kernel refused, ever more rarely: a driver may ask over and over.
    fn ask(&self, what: &str, done: Result<(), Errno>) -> bool {
        if let Err(error) = done {
            let times = self.refusals.increment();
            if times.is_power_of_two() {
                log::warn!("network interface {}: cannot {what}: {error} ({times})", self.id);
            }
        }
        done.is_ok()
    }
}

impl Front {
    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(interrupt) = &self.interrupt {
            interrupt.config();
        }
    }
}

/// The front of the device.
pub struct Net {
    config: NetConfig,
    features: u64,
    queue_sizes: Vec<u16>,
    ports: Vec<Arc<Port>>,
    /// The tap, where the kernel serves the queues.
    vhost_tap: Option<Arc<Tap>>,
    shared: Arc<Shared>,
}

/// Changes the device while it works.
#[derive(Clone)]
pub struct NetControl {
    shared: Arc<Shared>,
}

/// What a network device is made from.
pub struct NetSetup {
    /// What it is connected to.
    pub backend: NetBackend,
    /// What answers some frames in the network's place.
    pub interceptor: Option<Box<dyn FrameInterceptor>>,
}

impl Net {
    /// A device with these limits, at the time `now`.
    pub fn new(
        config: NetConfig,
        setup: NetSetup,
        rx_limits: RateLimiterConfig,
        tx_limits: RateLimiterConfig,
        now: Nanos,
    ) -> Result<(Self, NetControl), NetError> {
        let limiters = [rx_limits, tx_limits].map(|limits| RateLimiter::new(limits, now));
        let features = features(&config, &setup.backend);
        let front = Front {
            link_up: true,
            announce: false,
            can_announce: false,
            generation: 0,
            active_pairs: 1,
            offloads: 0,
            former_macs: Vec::new(),
            interrupt: None,
            kicks: Vec::new(),
        };
        Self::with(config, setup, features, limiters, front, now)
    }

    /// The device as it was saved, with another back end, and with the address `mac` if there is one, at the time `now`.
    ///
    /// It offers what it offered, as far as the new back end can: whether that is enough for its driver is seen when the driver's
    /// features are restored. The guest is asked to announce itself where it can: its network is another, or it is another guest.
    pub fn restore(
        state: &NetState,
        mac: Option<[u8; 6]>,
        setup: NetSetup,
        now: Nanos,
    ) -> Result<(Self, NetControl), NetError> {
        let config = NetConfig { mac: mac.or(state.config.mac), ..state.config.clone() };
        let renamed = config.mac != state.config.mac;
        let mut former_macs = state.former_macs.clone();
        if renamed {
            // What its driver has read, and what it may have been told since.
            former_macs.truncate(1);
            former_macs.push(state.config.mac);
        }
        let own = if renamed { feature::MAC } else { 0 };
        let features = (state.features | own) & features(&config, &setup.backend);
        let limiters =
            [&state.rx_limiter, &state.tx_limiter].map(|limiter| RateLimiter::restore(limiter, now));
        let announce = state.can_announce;
        let front = Front {
            link_up: true,
            announce,
            can_announce: announce,
            generation: state.generation.wrapping_add(1),
            active_pairs: state.active_pairs.clamp(1, state.config.pairs.max(1)),
            offloads: state.offloads,
            former_macs,
            interrupt: None,
            kicks: Vec::new(),
        };
        let (device, control) = Self::with(config, setup, features, limiters, front, now)?;
        let changed = announce || renamed || control.link_is_up() != state.link_up;
        control.shared.changed.store(changed, Ordering::Release);
        Ok((device, control))
    }

    fn with(
        config: NetConfig,
        setup: NetSetup,
        features: u64,
        [rx, tx]: [RateLimiter; 2],
        front: Front,
        now: Nanos,
    ) -> Result<(Self, NetControl), NetError> {
        let NetSetup { backend, interceptor } = setup;
        let mut front = front;
        front.link_up &= interceptor.is_some() || !matches!(backend.kind, Kind::Unplugged(_));
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
        let (tap, vhost_tap, mut ports) = match backend.kind {
            Kind::Tap(tap) => {
                let link =
                    |queue| Parts { link: Some(Link::Tap(Arc::clone(&tap), queue)), ..Parts::default() };
                let ports: Vec<Parts> = (0..tap.queues()).map(link).collect();
                (Some(tap), None, ports)
            }
            Kind::Vhost(tap, vhosts) => {
                for vhost in &vhosts {
                    vhost
                        .take()
                        .map_err(|source| NetError::VhostRefuses { id: config.id.clone(), source })?;
                }
                let port = |vhost| Parts { vhost: Some(vhost), ..Parts::default() };
                (Some(Arc::clone(&tap)), Some(tap), vhosts.into_iter().map(port).collect())
            }
            Kind::Unplugged(pairs) => (None, None, (0..pairs).map(|_| Parts::default()).collect()),
            Kind::Stream(stream) => {
                (None, None, vec![Parts { link: Some(Link::Stream(stream)), ..Parts::default() }])
            }
        };
        let has_detour = interceptor.is_some();
        if let Some(first) = ports.first_mut() {
            first.interceptor = interceptor;
        }
        let shared = Arc::new(Shared {
            id: config.id.clone(),
            stats: NetStats::default(),
            rx_limits: Limits::new(rx, now),
            tx_limits: Limits::new(tx, now),
            tap,
            pairs: config.pairs,
            has_detour,
            refusals: Counter::default(),
            asking: Mutex::new(CallBudget::new(now)),
            changed: AtomicBool::new(false),
            front: Mutex::new(front),
        });
        let control = NetControl { shared: Arc::clone(&shared) };
        // Two for each pair, and the control queue.
        let queue_sizes = vec![config.queue_size; 2 * usize::from(config.pairs) + 1];
        let ports = ports.into_iter().map(|parts| Arc::new(Port::new(parts))).collect();
        Ok((Net { config, features, queue_sizes, ports, vhost_tap, shared }, control))
    }

    fn config_space(&self, front: &Front) -> ConfigSpace {
        let link = if front.link_up { LINK_UP } else { 0 };
        let announce = if front.announce { ANNOUNCE } else { 0 };
        ConfigSpace {
            mac: self.config.mac.unwrap_or_default(),
            status: (link | announce).into(),
            max_virtqueue_pairs: self.config.pairs.into(),
            mtu: self.config.mtu.unwrap_or_default().into(),
        }
    }

    /// The tasks of the pairs and of the control queue.
    fn tasks(
        &self,
        activation: Activation,
        senders: &[[u8; 6]],
    ) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let Activation { memory, queues, interrupt, features, .. } = activation;
        let mut queues: Vec<Option<ActiveQueue>> = {
            let mut places: Vec<Option<ActiveQueue>> = self.queue_sizes.iter().map(|_| None).collect();
            for queue in queues {
                let index = usize::from(queue.queue.index());
                places[index] = Some(queue);
            }
            places
        };
        let pairs = if features & feature::MQ == 0 { 1 } else { self.ports.len() };
        let mut tasks: Vec<Box<dyn Task>> = Vec::new();
        for (pair, port) in self.ports[..pairs].iter().enumerate() {
            let (rx, tx) = (queues[2 * pair].take(), queues[2 * pair + 1].take());
            let (Some(rx), Some(tx)) = (rx, tx) else {
                if pair == 0 {
                    return Err(ActivateError::QueueMissing(0));
                }
                // The driver found no use for it.
                continue;
            };
            let (shared, port) = (Arc::clone(&self.shared), Arc::clone(port));
            let (memory, interrupt) = (memory.clone(), Arc::clone(&interrupt));
            match &self.vhost_tap {
                None => {
                    let senders = senders.to_vec();
                    let setup = task::Setup { shared, port, rx, tx, memory, interrupt, features, senders };
                    tasks.push(Box::new(PairTask::new(setup)));
                }
                Some(tap) => {
                    let (queues, tap) = ([rx, tx], Arc::clone(tap));
                    let setup =
                        vhost_task::Setup { shared, port, queues, memory, interrupt, features, tap, pair };
                    let task = VhostTask::new(setup).map_err(|source| ActivateError::Host {
                        doing: "make an event descriptor",
                        source,
                    })?;
                    tasks.push(Box::new(task));
                }
            }
        }
        if features & feature::CTRL_VQ != 0
            && let Some(queue) = queues[2 * pairs].take()
        {
            let shared = Arc::clone(&self.shared);
            tasks.push(Box::new(CtrlTask::new(shared, queue, memory, interrupt, features)));
        }
        Ok(tasks)
    }
}

/// The addresses that a guest may send from that has this one and had those before. None at all: any.
fn senders(mac: Option<[u8; 6]>, former: &[Option<[u8; 6]>]) -> Vec<[u8; 6]> {
    former.iter().copied().chain([mac]).collect::<Option<_>>().unwrap_or_default()
}

/// What a device offers.
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
        let (interrupt, features) = (Arc::clone(&activation.interrupt), activation.features);
        let kicks = activation.queues.iter().map(|queue| Arc::clone(&queue.kick)).collect();
        let restored = activation.restored;
        let former = if restored { locked(&self.shared.front).former_macs.clone() } else { Vec::new() };
        let senders = senders(self.config.mac, &former);
        let tasks = self.tasks(activation, &senders).inspect_err(|_| {
            self.shared.stats.activate_fails.add(1);
        })?;
        let mut front = locked(&self.shared.front);
        // What the tap is told of it, the first task tells it: this thread may not wait.
        let offloads = if restored { front.offloads } else { u64::MAX };
        front.offloads = offloads & features & feature::GUEST_OFFLOADS;
        if !restored || features & feature::MQ == 0 {
            front.active_pairs = 1;
        }
        front.former_macs = former;
        front.can_announce = features & feature::GUEST_ANNOUNCE != 0;
        front.interrupt = Some(interrupt);
        front.kicks = kicks;
        // Here, not when a task runs: a save before that keeps the interrupt pending.
        if self.shared.changed.swap(false, Ordering::AcqRel) && restored {
            front.changed();
        }
        Ok(tasks)
    }

    fn reset(&mut self) {
        let mut front = locked(&self.shared.front);
        front.interrupt = None;
        front.kicks.clear();
        front.announce = false;
        front.can_announce = false;
        drop(front);
        for port in &self.ports {
            let mut parts = port.take();
            if let Some(interceptor) = &mut parts.interceptor {
                interceptor.reset();
            }
            port.put(parts);
        }
    }

    fn save(&self) -> DeviceState {
        let front = locked(&self.shared.front);
        DeviceState::of(&NetState {
            config: self.config.clone(),
            features: self.features,
            active_pairs: front.active_pairs,
            offloads: front.offloads,
            link_up: front.link_up,
            can_announce: front.can_announce,
            generation: front.generation,
            former_macs: front.former_macs.clone(),
            rx_limiter: self.shared.rx_limits.save(),
            tx_limiter: self.shared.tx_limits.save(),
        })
    }
}

impl NetControl {
    /// What the device counts.
    pub fn stats(&self) -> &NetStats {
        &self.shared.stats
    }

    /// Whether the guest has a network.
    pub fn link_is_up(&self) -> bool {
        locked(&self.shared.front).link_up
    }

    /// The limits in force: on what the guest receives, and on what it sends.
    pub fn limits(&self) -> [RateLimiterConfig; 2] {
        [self.shared.rx_limits.config(), self.shared.tx_limits.config()]
    }

    /// Changes limits at the time `now`: on what the guest receives, and on what it sends. Frames that wait are looked at again.
    pub fn update_limits(&self, rx: RateLimiterUpdate, tx: RateLimiterUpdate, now: Nanos) {
        self.shared.rx_limits.update(rx, now);
        self.shared.tx_limits.update(tx, now);
        self.shared.stats.update_count.add(1);
        locked(&self.shared.front).kicks.iter().for_each(|kick| kick.signal());
    }
}

#[cfg(test)]
impl NetControl {
    /// The tap, where the io workers serve one.
    pub(super) fn tap(&self) -> &Tap {
        self.shared.tap.as_ref().expect("the back end is a tap")
    }
}

impl fmt::Debug for NetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetControl").field("id", &self.shared.id).finish_non_exhaustive()
    }
}
