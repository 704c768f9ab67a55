//! The device's work: requests from the queues to the disk, and completions back.
//!
//! # Bounds
//!
//! At most [`MAX_IN_FLIGHT`] requests are in flight, and none is taken that exceeds the disk's
//! [backlog](crate::disk::backlog): all of them must complete before the guest is paused, so there
//! must not be more than a disk can do in a few seconds. Further requests wait in the guest's
//! rings. A pause does not wait for the rest of a large discard, which is a hint.
//!
//! A call does at most [`ROUNDS`] rounds of at most [`BATCH`] requests before other tasks run.
//! Completions are published after each round, so the driver can work while the rest of a long
//! queue is served.
//!
//! # Path of a request
//!
//! ```text
//! take_requests        pop -> parse -> backlog, rate limiter (or rewind) -> DiskQueue::enqueue,
//!                      or complete at once if the disk is not needed
//! submit_and_reap      one system call for all enqueued requests
//! publish_completions  DiskQueue::pop_completion -> status byte -> used ring -> interrupt
//! ```

use std::fmt;
use std::io;
use std::sync::Arc;

use memory::GuestRam;
use memory::iovec::{Access, GuestIoVec};
use rustix::io::Errno;

use crate::backend_slot::{BackendHandle, BackendSlot, PendingSwap};
use crate::disk::DISCARD_AT_A_TIME;
use crate::disk::queue::DiskQueue;
use crate::in_flight::{InFlight, InFlightRequest, RequestKind};
use crate::io_request::{Request, Token as DiskToken};
use crate::request::{self, Command, Limits, Parsed, Range, Status};
use crate::shared::Shared;
use sync::EventFd;
use sync::locked;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::queue::{Buffers, Chain, Queue, QueueError};
use virtio::worker::{Context, Event, Interest, Nanos, Placement, Task, Token};

/// Most requests in flight.
const MAX_IN_FLIGHT: usize = 256;
/// Most requests that are taken before they are submitted.
const BATCH: usize = 16;
/// Most rounds of one call.
const ROUNDS: u32 = 32;

/// A handle was posted to the slot, or the limits changed.
const SLOT: Token = 0;
/// The disk has completions.
const DISK: Token = 1;
/// The first queue was kicked; the other queues have the tokens after it.
const FIRST_KICK: Token = 2;

/// What a task is built from.
pub(crate) struct Setup {
    pub(crate) shared: Arc<Shared>,
    pub(crate) slot: Arc<BackendSlot>,
    pub(crate) queues: Vec<ActiveQueue>,
    pub(crate) memory: GuestRam,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    pub(crate) read_only: bool,
    /// Whether each change is made durable before it completes, because the driver did not
    /// negotiate `VIRTIO_BLK_F_FLUSH`.
    pub(crate) write_through: bool,
    pub(crate) placement: Placement,
}

/// Serves the queues of one slot.
pub(crate) struct BlockTask {
    setup: Setup,
    /// The handle of the disk. Parked in the slot while the task is quiesced and has nothing in
    /// flight, so that the disk can be swapped.
    backend: Option<Box<BackendHandle>>,
    rings: Vec<Ring>,
    /// Index of the ring to serve first; it rotates, so that no ring is always last.
    next_ring: usize,
    /// The handle to swap to once nothing is in flight.
    pending: Option<PendingSwap>,
    in_flight: InFlight,
    /// Requests taken so far.
    taken: u64,
    /// When this round took its first request.
    round_began: Option<Nanos>,
    chain: Chain,
    ranges: Vec<Range>,
    /// Set from `quiesce` to `resume`.
    quiesced: bool,
    /// The rate limiter holds a request back, and the timer is set.
    throttled: bool,
    /// The device needs a reset.
    failed: bool,
}

/// A queue and what is to be published of it.
struct Ring {
    queue: Queue,
    kick: Arc<EventFd>,
    /// Used elements were added since the last `publish`.
    used: bool,
    /// The last `pop` found the queue empty.
    empty: bool,
}

/// Why `take_requests` ended.
enum Stop {
    /// The queues are empty.
    Empty,
    /// The batch is full; there may be more.
    Batch,
    /// No request may be taken now. An event or the timer runs the task again.
    Held,
}

impl BlockTask {
    pub(crate) fn new(mut setup: Setup) -> Self {
        let queues = std::mem::take(&mut setup.queues);
        let ring = |ActiveQueue { queue, kick }| Ring { queue, kick, used: false, empty: false };
        BlockTask {
            rings: queues.into_iter().map(ring).collect(),
            backend: None,
            setup,
            next_ring: 0,
            pending: None,
            in_flight: InFlight::default(),
            taken: 0,
            round_began: None,
            chain: Chain::new(),
            ranges: Vec::new(),
            quiesced: true,
            throttled: false,
            failed: false,
        }
    }

    /// Serves the queues, and parks the handle if the task is quiesced and idle.
    fn work(&mut self, cx: &mut Context<'_>) {
        let Some(mut backend) = self.backend.take() else { return };
        if !self.failed
            && let Err(error) = self.serve(cx, &mut backend)
        {
            self.fail_device(cx, &error);
        }
        if self.failed {
            // Completions are dropped, but the requests in flight must end.
            backend.queue.release(self.in_flight.clear());
            backend.queue.submit_and_reap();
            while backend.queue.pop_completion().is_some() {}
            if backend.queue.has_more() {
                self.reschedule(cx);
            }
            self.swap_disk(cx, &mut backend);
        }
        if self.quiesced && backend.queue.is_idle() {
            cx.unwatch(DISK);
            self.setup.slot.park(backend, self.pending.take());
        } else {
            self.backend = Some(backend);
        }
    }

    /// Marks the device as broken until it is reset.
    fn fail_device(&mut self, cx: &mut Context<'_>, why: &dyn fmt::Display) {
        self.failed = true;
        cx.clear_timer();
        self.setup.interrupt.needs_reset(why);
    }

    fn serve(&mut self, cx: &mut Context<'_>, backend: &mut Box<BackendHandle>) -> Result<(), QueueError> {
        for ring in &mut self.rings {
            ring.queue.disable_notifications()?;
        }
        for _ in 0..ROUNDS {
            self.swap_disk(cx, backend);
            let stop = self.take_requests(cx, backend)?;
            backend.queue.submit_and_reap();
            let published = self.publish_completions(cx, &mut backend.queue)?;
            if published || backend.queue.has_more() || matches!(stop, Stop::Batch) {
                continue;
            }
            // Nothing is left but to wait, unless a request came in between.
            if matches!(stop, Stop::Empty) && self.enable_notifications()? {
                continue;
            }
            let can_swap = self.pending.is_some() && backend.queue.is_idle();
            if !can_swap {
                return Ok(());
            }
        }
        self.reschedule(cx);
        Ok(())
    }

    /// Asks to run again after other tasks have run.
    fn reschedule(&self, cx: &mut Context<'_>) {
        if self.quiesced {
            // A quiesced task is only run by its events.
            self.setup.slot.event.signal();
        } else {
            cx.reschedule();
        }
    }

    /// Asks the drivers of all queues to kick. True if a request came meanwhile.
    fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        let mut more = false;
        for ring in &mut self.rings {
            more |= ring.queue.enable_notifications()?;
        }
        Ok(more)
    }

    /// Takes requests from the queues and enqueues them to the disk.
    fn take_requests(
        &mut self,
        cx: &mut Context<'_>,
        backend: &mut BackendHandle,
    ) -> Result<Stop, QueueError> {
        if self.quiesced || self.pending.is_some() {
            return Ok(Stop::Held);
        }
        self.rings.iter_mut().for_each(|ring| ring.empty = false);
        self.round_began = None;
        let count = self.rings.len();
        let mut taken = 0;
        let mut index = self.next_ring;
        // One of each ring in turn, until all are empty.
        while self.rings.iter().any(|ring| !ring.empty) {
            if taken == BATCH {
                self.next_ring = index;
                return Ok(Stop::Batch);
            }
            if backend.queue.in_flight() >= MAX_IN_FLIGHT {
                self.next_ring = index;
                self.setup.shared.stats.engine_throttled_events.add(1);
                self.count_remaining(index)?;
                return Ok(Stop::Held);
            }
            let ring = &mut self.rings[index];
            if !ring.empty {
                if ring.queue.pop(&mut self.chain)? {
                    if !self.take_request(cx, backend, index)? {
                        // This ring is served first next time, so that no other takes what the
                        // limiter or the backlog frees.
                        self.next_ring = index;
                        return Ok(Stop::Held);
                    }
                    taken += 1;
                    self.taken += 1;
                } else {
                    ring.empty = true;
                }
            }
            index = (index + 1) % count;
        }
        Ok(Stop::Empty)
    }

    /// Counts the requests that are left in ring `index` because one is held back.
    fn count_remaining(&mut self, index: usize) -> Result<(), QueueError> {
        let left = self.rings[index].queue.available()?;
        self.setup.shared.stats.remaining_reqs_count.add(left.into());
        Ok(())
    }

    /// Takes the request that was popped from ring `index`. False if the rate limiter or the
    /// backlog holds it back.
    fn take_request(
        &mut self,
        cx: &mut Context<'_>,
        backend: &mut BackendHandle,
        index: usize,
    ) -> Result<bool, QueueError> {
        let limits = Limits { size: backend.size, read_only: self.setup.read_only };
        let parsed = request::parse(&self.chain, &self.setup.memory, limits, &mut self.ranges)?;
        let command = parsed.as_ref().ok().map(|parsed| &parsed.command);
        let (bytes, cost) = cost_of(command, &self.ranges, &backend.queue);
        let is_read = matches!(command, Some(Command::Read { .. }));
        if !backend.queue.reserve(cost, is_read) {
            self.setup.shared.stats.engine_throttled_events.add(1);
            self.rings[index].queue.rewind(&self.chain)?;
            self.count_remaining(index)?;
            return Ok(false);
        }
        if !self.setup.shared.allow(cx, bytes) {
            backend.queue.release(cost);
            self.rings[index].queue.rewind(&self.chain)?;
            if !std::mem::replace(&mut self.throttled, true) {
                self.setup.shared.stats.rate_limiter_throttled_events.add(1);
                self.count_remaining(index)?;
            }
            return Ok(false);
        }
        if std::mem::take(&mut self.throttled) {
            cx.clear_timer();
        }
        let ring = &mut self.rings[index];
        let head = self.chain.head();
        let stats = &self.setup.shared.stats;
        let Ok(Parsed { command, status, data_len }) = parsed else {
            stats.invalid_reqs_count.add(1);
            ring.used = true;
            // Without a status byte nothing was written.
            ring.queue.add_used(head, 0)?;
            return Ok(true);
        };
        let request = InFlightRequest {
            ring: index as u16,
            head,
            data_len,
            status,
            kind: RequestKind::Flush,
            started: *self.round_began.get_or_insert_with(|| cx.read_clock()),
            bytes: cost,
            left: 1,
            later: Vec::new(),
            error: None,
            syncing: false,
        };
        let disk = &mut backend.queue;
        let ram = &self.setup.memory;
        match command {
            Command::Read { offset, to } => {
                let kind = RequestKind::Read { bytes: to.len().into() };
                let buffers =
                    gather(disk.buffers(), ram, to, Access::Write).inspect_err(|_| disk.release(cost))?;
                let token = self.in_flight.add(InFlightRequest { kind, ..request });
                disk.enqueue(token, offset, Request::Read(buffers));
            }
            Command::Write { offset, from } => {
                let kind = RequestKind::Write { bytes: from.len().into() };
                let buffers =
                    gather(disk.buffers(), ram, from, Access::Read).inspect_err(|_| disk.release(cost))?;
                let token = self.in_flight.add(InFlightRequest { kind, ..request });
                disk.enqueue(token, offset, Request::Write(buffers));
            }
            Command::Flush => {
                let token = self.in_flight.add(request);
                disk.enqueue(token, 0, Request::Flush);
            }
            Command::Discard => {
                let all: u64 = self.ranges.iter().map(|range| range.len).sum();
                // A command has one range at least.
                let at_once = if all > DISCARD_AT_A_TIME { 1 } else { self.ranges.len() };
                let (now, later) = self.ranges.split_at(at_once);
                let later = later.iter().rev().copied().collect();
                let left = now.len() as u32;
                let token = self.in_flight.add(InFlightRequest {
                    kind: RequestKind::Discard,
                    left,
                    later,
                    ..request
                });
                for &Range { offset, len, .. } in now {
                    disk.enqueue(token, offset, Request::Discard { len });
                }
            }
            Command::WriteZeroes => {
                let left = self.ranges.len() as u32;
                let token =
                    self.in_flight.add(InFlightRequest { kind: RequestKind::Discard, left, ..request });
                for &Range { offset, len, unmap } in &self.ranges {
                    disk.enqueue(token, offset, Request::WriteZeroes { len, unmap });
                }
            }
            Command::GetId { to } => {
                let written = to.write(ram, &self.setup.shared.serial)? as u32;
                complete(ring, ram, &request, Status::Ok, written)?;
            }
            Command::Fail(status) => {
                stats.invalid_reqs_count.add(1);
                complete(ring, ram, &request, status, 0)?;
            }
        }
        Ok(true)
    }

    /// Completes what the disk has finished, and publishes it. True if there was anything.
    fn publish_completions(&mut self, cx: &Context<'_>, disk: &mut DiskQueue) -> Result<bool, QueueError> {
        let mut now = None;
        while let Some((token, result)) = disk.pop_completion() {
            let now = *now.get_or_insert_with(|| cx.read_clock());
            self.finish(disk, token, result, now)?;
        }
        let mut published = false;
        for ring in &mut self.rings {
            if std::mem::take(&mut ring.used) {
                published = true;
                if ring.queue.publish()? {
                    self.setup.interrupt.queue(ring.queue.index());
                }
            }
        }
        Ok(published)
    }

    /// Handles one completion of the disk, at the time `now`.
    fn finish(
        &mut self,
        disk: &mut DiskQueue,
        token: DiskToken,
        result: Result<(), Errno>,
        now: Nanos,
    ) -> Result<(), QueueError> {
        let request = self.in_flight.get(token);
        request.left -= 1;
        if let Err(errno) = result {
            request.error.get_or_insert(errno);
        }
        if request.left > 0 {
            return Ok(());
        }
        if request.error.is_none()
            && !self.quiesced
            && let Some(Range { offset, len, .. }) = request.later.pop()
        {
            request.left = 1;
            disk.enqueue(token, offset, Request::Discard { len });
            return Ok(());
        }
        if self.setup.write_through
            && request.kind.changes_disk()
            && request.error.is_none()
            && !std::mem::replace(&mut request.syncing, true)
        {
            request.left = 1;
            disk.enqueue(token, 0, Request::Flush);
            return Ok(());
        }
        let request = self.in_flight.remove(token);
        disk.release(request.bytes);
        let (status, written) = match (request.error, request.kind) {
            (None, kind) => {
                self.setup.shared.stats.count(kind, now.saturating_sub(request.started));
                // A read fills all of its buffers. Other requests write nothing but the status.
                let written = if matches!(kind, RequestKind::Read { .. }) { request.data_len } else { 0 };
                (Status::Ok, written)
            }
            (Some(errno), kind) => {
                self.report(kind, errno);
                (Status::IoError, 0)
            }
        };
        complete(&mut self.rings[usize::from(request.ring)], &self.setup.memory, &request, status, written)
    }

    /// Counts a failed request, and logs it if the count is a power of two.
    fn report(&self, kind: RequestKind, errno: Errno) {
        let failures = self.setup.shared.stats.execute_fails.increment();
        if failures.is_power_of_two() {
            let id = &self.setup.shared.id;
            log::warn!("drive {id}: a {kind} failed: {errno} (failures so far: {failures})");
        }
    }

    /// Swaps the disk if a handle was posted and the old disk has nothing in flight.
    fn swap_disk(&mut self, cx: &mut Context<'_>, backend: &mut Box<BackendHandle>) {
        if let Some(pending) = self.setup.slot.take_pending()
            && let Some(PendingSwap { handle, old }) = self.pending.replace(pending)
        {
            // This handle was replaced before it was used. The waiter may have timed out.
            let _ = old.send(handle);
        }
        if self.pending.is_none() || !backend.queue.is_idle() {
            return;
        }
        let Some(PendingSwap { handle: new, old }) = self.pending.take() else { return };
        cx.unwatch(DISK);
        let _ = old.send(std::mem::replace(backend, new));
        if let Err(error) = watch_disk(cx, backend) {
            self.fail_device(cx, &format_args!("cannot wait for the new disk: {error}"));
        }
    }
}

/// Runs the task when the disk has completions.
fn watch_disk(cx: &mut Context<'_>, backend: &BackendHandle) -> io::Result<()> {
    match backend.queue.event() {
        Some(event) => cx.watch(DISK, event, Interest::READ),
        None => Ok(()),
    }
}

/// Bytes that a request counts for the rate limiter, and bytes that it makes the disk move.
fn cost_of(command: Option<&Command<'_>>, ranges: &[Range], queue: &DiskQueue) -> (u64, u64) {
    let all = || ranges.iter().map(|range| range.len).sum::<u64>();
    match command {
        Some(Command::Read { to, .. }) => (to.len().into(), to.len().into()),
        Some(Command::Write { offset, from }) => {
            let bytes = from.len().into();
            (bytes, queue.cost_of_write(*offset, bytes))
        }
        // If the disk has no other way, the zeros are written.
        Some(Command::WriteZeroes) => {
            let cost = ranges.iter().map(|range| queue.cost_of_write(range.offset, range.len)).sum();
            (all(), cost)
        }
        // If the ranges are more than that together, they are discarded one after the other.
        Some(Command::Discard) => (0, all().min(DISCARD_AT_A_TIME)),
        _ => (0, 0),
    }
}

/// Adds the buffers of a request's data to `list`, which is empty. `access` is what the device does
/// with them: a disk read writes them.
fn gather(
    mut list: GuestIoVec,
    ram: &GuestRam,
    data: Buffers<'_>,
    access: Access,
) -> Result<GuestIoVec, QueueError> {
    for buffer in data.iter() {
        list.push_merged(ram, buffer.addr, buffer.len as usize, access)?;
    }
    Ok(list)
}

/// Writes the status byte of a request and adds the used element. `written` is the number of data
/// bytes that the device wrote, from the first device-writable byte on.
fn complete(
    ring: &mut Ring,
    ram: &GuestRam,
    request: &InFlightRequest,
    status: Status,
    written: u32,
) -> Result<(), QueueError> {
    request.status.slice(ram)?.copy_from(&[status as u8]);
    ring.used = true;
    ring.queue.add_used(request.head, request::used_len(request.data_len, written))
}

impl Task for BlockTask {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        cx.watch_edge(SLOT, &self.setup.slot.event, Interest::READ)?;
        for (token, ring) in (FIRST_KICK..).zip(&self.rings) {
            cx.watch_kick(token, &ring.kick)?;
        }
        Ok(())
    }

    fn kicked(&mut self, cx: &mut Context<'_>, _token: Token) {
        let stats = &self.setup.shared.stats;
        stats.queue_event_count.add(1);
        let taken = self.taken;
        self.work(cx);
        if self.taken == taken && self.rings.iter().all(|ring| ring.empty) {
            self.setup.shared.stats.no_avail_buffer.add(1);
        }
    }

    fn ready(&mut self, cx: &mut Context<'_>, _event: Event) {
        self.work(cx);
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        if std::mem::take(&mut self.throttled) {
            self.setup.shared.stats.rate_limiter_event_count.add(1);
        }
        self.work(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        self.quiesced = true;
        if let Some(backend) = &mut self.backend {
            backend.queue.set_draining(true);
        }
        self.throttled = false;
        cx.clear_timer();
        // The state is saved as of this time.
        locked(&self.setup.shared.limits).now = cx.now();
        self.work(cx);
    }

    fn is_drained(&self) -> bool {
        self.backend.is_none()
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.quiesced = false;
        if self.backend.is_none() {
            self.backend = self.setup.slot.take();
            let watched = match &self.backend {
                Some(backend) => watch_disk(cx, backend),
                None => Err(io::ErrorKind::NotConnected.into()),
            };
            if let Err(error) = watched {
                self.fail_device(cx, &format_args!("cannot wait for the disk: {error}"));
            }
        }
        if let Some(backend) = &mut self.backend {
            backend.queue.set_draining(false);
        }
        self.work(cx);
    }

    fn placement(&self) -> Placement {
        self.setup.placement
    }

    fn detach(self: Box<Self>) {
        // A drained task has parked it already.
        if let Some(backend) = self.backend {
            self.setup.slot.park(backend, self.pending);
        }
    }
}
