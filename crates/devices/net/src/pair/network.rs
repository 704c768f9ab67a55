//! The network end of a queue pair, as its task watches it.

use rustix::io::Errno;

use super::context::PairError;
use crate::backend::Link;
use crate::backend::tap::is_gone;
use crate::shared::Shared;
use virtio::worker::{Context, Interest, Nanos, Token};

/// The network has frames, or is gone.
pub(super) const READABLE: Token = 0;
/// The network accepts more frames.
pub(super) const WRITABLE: Token = 1;

/// Interval between two probes of a network that does not report that it is gone.
pub(crate) const PROBE_INTERVAL: Nanos = 1_000_000_000;

/// The link of a queue pair, and which of its events the task watches.
pub(super) struct Network {
    /// None: the network is gone, or the task is not attached.
    link: Option<Link>,
    watches_readable: bool,
    watches_writable: bool,
}

impl Network {
    pub(super) fn new(link: Option<Link>) -> Self {
        Network { link, watches_readable: false, watches_writable: false }
    }

    pub(super) fn link(&mut self) -> Option<&mut Link> {
        self.link.as_mut()
    }

    pub(super) fn is_open(&self) -> bool {
        self.link.is_some()
    }

    pub(super) fn into_link(self) -> Option<Link> {
        self.link
    }

    /// Watches for frames. Does nothing if it does so already.
    pub(super) fn watch_readable(&mut self, cx: &mut Context<'_>) -> Result<(), PairError> {
        if let Some(link) = self.link.as_ref().filter(|_| !self.watches_readable) {
            cx.watch_edge(READABLE, link.fd(), Interest::READ).map_err(PairError::Watch)?;
            self.watches_readable = true;
        }
        Ok(())
    }

    /// Watches for space. Does nothing if it does so already.
    pub(super) fn watch_writable(&mut self, cx: &mut Context<'_>) -> Result<(), PairError> {
        if let Some(link) = self.link.as_ref().filter(|_| !self.watches_writable) {
            cx.watch_edge(WRITABLE, link.fd(), Interest::WRITE).map_err(PairError::Watch)?;
            self.watches_writable = true;
        }
        Ok(())
    }

    pub(super) fn unwatch_readable(&mut self, cx: &mut Context<'_>) {
        if std::mem::take(&mut self.watches_readable) {
            cx.unwatch(READABLE);
        }
    }

    fn unwatch_writable(&mut self, cx: &mut Context<'_>) {
        if std::mem::take(&mut self.watches_writable) {
            cx.unwatch(WRITABLE);
        }
    }

    pub(super) fn unwatch(&mut self, cx: &mut Context<'_>) {
        self.unwatch_readable(cx);
        self.unwatch_writable(cx);
    }

    /// Writes buffered frames, and watches for space if some are left.
    pub(super) fn flush(&mut self, shared: &Shared, cx: &mut Context<'_>) -> Result<(), PairError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if let Err(error) = link.flush() {
            self.close(shared, cx, error);
        } else if link.has_unsent() {
            self.watch_writable(cx)?;
        }
        Ok(())
    }

    /// Handles [`WRITABLE`]: writes buffered frames, and ends the watch once none are left.
    pub(super) fn writable(&mut self, shared: &Shared, cx: &mut Context<'_>) -> Result<(), PairError> {
        self.flush(shared, cx)?;
        if self.link.as_ref().is_none_or(|link| !link.has_unsent()) {
            self.unwatch_writable(cx);
        }
        Ok(())
    }

    /// Closes the link after an error that says that the network is gone for good.
    pub(super) fn close(&mut self, shared: &Shared, cx: &mut Context<'_>, error: Errno) {
        self.unwatch(cx);
        if let Some(link) = self.link.take() {
            shared.link_down(&format_args!("{}: {error}", link.name()));
            link.close();
        }
    }

    /// Checks whether a macvtap still exists, and closes the link if not. Returns when to check
    /// again. Other links report by themselves that they are gone.
    pub(super) fn probe(&mut self, shared: &Shared, cx: &mut Context<'_>) -> Option<Nanos> {
        let Some(Link::Tap(tap, _)) = &self.link else { return None };
        if !tap.is_macvtap() {
            return None;
        }
        if let Err(at) = shared.may_probe(cx.now()) {
            return Some(at);
        }
        match tap.probe() {
            Err(error) if is_gone(error) => {
                self.close(shared, cx, error);
                None
            }
            _ => Some(cx.now().saturating_add(PROBE_INTERVAL)),
        }
    }
}
