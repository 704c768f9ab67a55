//! State that a network device shares with its tasks and with [`NetControl`](crate::NetControl).

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

use crate::backend::tap::{Tap, is_gone};
use crate::rtnl_budget::RtnlBudget;
use crate::shared_limiter::SharedLimiter;
use crate::stats::NetStats;
use sync::Counter;
use sync::EventFd;
use sync::locked;
use virtio::device::Interrupt;
use virtio::worker::Nanos;

/// State that the device, its tasks and its control share.
pub(crate) struct Shared {
    pub(crate) id: String,
    pub(crate) stats: Arc<NetStats>,
    /// Rate limiter of frames to the guest.
    pub(crate) rx_limiter: SharedLimiter,
    /// Rate limiter of frames from the guest.
    pub(crate) tx_limiter: SharedLimiter,
    /// The tap that gets the driver's offloads and number of queue pairs. None: the backend has no
    /// such settings.
    tap: Option<Arc<Tap>>,
    /// Number of queue pairs.
    pairs: u16,
    /// Whether a [`FrameInterceptor`](crate::FrameInterceptor) replies to some frames.
    has_interceptor: bool,
    /// Number of settings that the kernel refused.
    refusals: Counter,
    /// Bounds the ioctls under RTNL. The lock is held until the ioctls that it allowed are done, so
    /// that the settings of several tasks are not mixed.
    rtnl_budget: Mutex<RtnlBudget>,
    /// Whether the configuration space differs from the one that the saved guest saw. The driver is
    /// interrupted when the device is restored.
    config_changed: AtomicBool,
    live: Mutex<LiveState>,
}

/// What a [`Shared`] is created from.
pub(crate) struct SharedSetup {
    pub(crate) id: String,
    pub(crate) rx_limiter: SharedLimiter,
    pub(crate) tx_limiter: SharedLimiter,
    pub(crate) tap: Option<Arc<Tap>>,
    pub(crate) pairs: u16,
    pub(crate) has_interceptor: bool,
    pub(crate) rtnl_budget: RtnlBudget,
    pub(crate) live: LiveState,
}

/// State that changes while the device runs.
pub(crate) struct LiveState {
    pub(crate) link_up: bool,
    /// Whether `VIRTIO_NET_S_ANNOUNCE` is set: the guest has not announced itself yet.
    pub(crate) announce: bool,
    /// Whether the driver accepted `VIRTIO_NET_F_GUEST_ANNOUNCE`.
    pub(crate) can_announce: bool,
    /// Generation of the configuration space.
    pub(crate) generation: u32,
    /// Number of queue pairs that the driver negotiated.
    pub(crate) active_pairs: u16,
    /// Offloads that the driver accepts for received frames.
    pub(crate) offloads: u64,
    /// See [`NetState::former_macs`](crate::NetState::former_macs).
    pub(crate) former_macs: Vec<Option<[u8; 6]>>,
    pub(crate) interrupt: Option<Arc<dyn Interrupt>>,
    /// Kicks of all queues, to wake the tasks.
    pub(crate) kicks: Vec<Arc<EventFd>>,
}

impl LiveState {
    /// State of a device without a driver.
    pub(crate) fn new() -> Self {
        LiveState {
            link_up: true,
            announce: false,
            can_announce: false,
            generation: 0,
            active_pairs: 1,
            offloads: 0,
            former_macs: Vec::new(),
            interrupt: None,
            kicks: Vec::new(),
        }
    }

    /// Counts a change of the configuration space and interrupts the driver.
    pub(crate) fn notify_config_change(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(interrupt) = &self.interrupt {
            interrupt.config();
        }
    }
}

impl Shared {
    pub(crate) fn new(setup: SharedSetup) -> Self {
        let SharedSetup { id, rx_limiter, tx_limiter, tap, pairs, has_interceptor, rtnl_budget, live } =
            setup;
        Shared {
            id,
            stats: Arc::default(),
            rx_limiter,
            tx_limiter,
            tap,
            pairs,
            has_interceptor,
            refusals: Counter::default(),
            rtnl_budget: Mutex::new(rtnl_budget),
            config_changed: AtomicBool::new(false),
            live: Mutex::new(live),
        }
    }

    pub(crate) fn live(&self) -> MutexGuard<'_, LiveState> {
        locked(&self.live)
    }

    /// Sets whether the driver must be interrupted when the device is restored.
    pub(crate) fn set_config_changed(&self, changed: bool) {
        self.config_changed.store(changed, Ordering::Release);
    }

    /// Clears and returns what [`Shared::set_config_changed`] has set.
    pub(crate) fn take_config_changed(&self) -> bool {
        self.config_changed.swap(false, Ordering::AcqRel)
    }

    /// Takes the link down because the network is gone. With an interceptor the link stays up: a
    /// guest sends nothing over a link that is down.
    pub(crate) fn link_down(&self, why: &dyn fmt::Display) {
        if self.has_interceptor {
            log::warn!("network interface {}: only the metadata service is left: {why}", self.id);
            return;
        }
        let mut live = self.live();
        if std::mem::replace(&mut live.link_up, false) {
            log::warn!("network interface {}: the link is down: {why}", self.id);
            live.notify_config_change();
        }
    }

    /// Clears `VIRTIO_NET_S_ANNOUNCE`: the driver has announced itself.
    pub(crate) fn acknowledge_announce(&self) {
        self.live().announce = false;
    }

    /// Sets the number of active queue pairs. `Ok(false)`: the number is invalid, or the kernel
    /// refused it. The error is the time at which to try again.
    pub(crate) fn set_active_pairs(&self, pairs: u16, now: Nanos) -> Result<bool, Nanos> {
        if !(1..=self.pairs).contains(&pairs) {
            return Ok(false);
        }
        let mut budget = locked(&self.rtnl_budget);
        if let Some(tap) = &self.tap {
            budget.take(tap.rtnl_ioctls(None, Some(pairs.into())), now)?;
        }
        let done = self.tap.as_ref().map_or(Ok(()), |tap| tap.set_active_queues(pairs.into()));
        Ok(self.check("change the number of queues", done) && {
            self.live().active_pairs = pairs;
            true
        })
    }

    /// Sets the offloads for received frames. `Ok(false)`: the kernel refused them. The error is
    /// the time at which to try again.
    pub(crate) fn set_offloads(&self, offloads: u64, now: Nanos) -> Result<bool, Nanos> {
        let mut budget = locked(&self.rtnl_budget);
        if let Some(tap) = &self.tap {
            budget.take(tap.rtnl_ioctls(Some(offloads), None), now)?;
        }
        let done = self.tap.as_ref().map_or(Ok(()), |tap| tap.set_offloads(offloads));
        Ok(self.check("change the offloads", done) && {
            self.live().offloads = offloads;
            true
        })
    }

    /// Applies the driver's offloads and number of queue pairs to the tap.
    ///
    /// The error is the time at which to try again. Until then no frame may be received, because it
    /// could be larger than the driver accepts.
    pub(crate) fn apply_tap_settings(&self, now: Nanos) -> Result<(), Nanos> {
        let Some(tap) = &self.tap else { return Ok(()) };
        let mut budget = locked(&self.rtnl_budget);
        let (offloads, pairs) = {
            let live = self.live();
            (live.offloads, live.active_pairs)
        };
        budget.take(tap.rtnl_ioctls(Some(offloads), Some(pairs.into())), now)?;
        for (what, done) in [
            ("set the offloads", tap.set_offloads(offloads)),
            ("set the number of queues", tap.set_active_queues(pairs.into())),
        ] {
            match done {
                // The tap may have been deleted. The link goes down, and the device keeps working.
                Err(error) if is_gone(error) => self.link_down(&format_args!("{}: {error}", tap.name())),
                done => _ = self.check(what, done),
            }
        }
        Ok(())
    }

    /// Takes the ioctl of [`Tap::probe`] from the budget. The error is the time at which to try
    /// again.
    pub(crate) fn may_probe(&self, now: Nanos) -> Result<(), Nanos> {
        locked(&self.rtnl_budget).take(1, now)
    }

    /// Whether a setting succeeded. Failures are logged at powers of two, because a driver may
    /// cause them in a loop.
    fn check(&self, what: &str, done: Result<(), Errno>) -> bool {
        if let Err(error) = done {
            let times = self.refusals.increment();
            if times.is_power_of_two() {
                log::warn!("network interface {}: cannot {what}: {error} ({times} times)", self.id);
            }
        }
        done.is_ok()
    }
}

#[cfg(test)]
impl Shared {
    /// The tap that an io worker serves.
    pub(crate) fn tap(&self) -> &Tap {
        self.tap.as_ref().expect("the backend is a tap")
    }
}
