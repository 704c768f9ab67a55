//! Deadlines of connections, and retries.

use virtio::worker::{Context, Nanos};

use crate::connection::State;
use crate::muxer::Muxer;
use crate::table::Slot;

impl Muxer {
    /// Handles all deadlines that have passed.
    pub(crate) fn run_timers(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        if self.accept_retry_at.is_some_and(|at| at <= now) {
            self.accept_retry_at = None;
        }
        if self.connect_retry_at.is_some_and(|at| at <= now) {
            self.retry_connects(cx);
        }
        while let Some(slot) = self.table.expired(now) {
            match self.table.get(slot).map(|connection| connection.state) {
                Some(State::Connecting) => self.refuse_connection(cx, slot),
                Some(State::Established) => self.request_credit(cx, slot),
                Some(_) => self.kill(cx, slot),
                None => {}
            }
        }
    }

    /// When [`Muxer::run_timers`] is to be called next.
    pub(crate) fn next_timer(&self) -> Option<Nanos> {
        let connect_retry_at = self.connect_retry_at.filter(|_| self.table.servers() > 0);
        [self.accept_retry_at, connect_retry_at, self.table.next_deadline()].into_iter().flatten().min()
    }

    /// Asks the guest for credit, as it has had none for some time.
    fn request_credit(&mut self, cx: &mut Context<'_>, slot: Slot) {
        if let Some(connection) = self.table.get(slot).filter(|c| c.is_stalled()) {
            connection.pending.credit_request = true;
            connection.credit_requests = connection.credit_requests.saturating_add(1);
            self.schedule(cx, slot);
        }
    }
}
