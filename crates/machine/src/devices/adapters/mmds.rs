//! The metadata service as a network device knows it.

use std::sync::Arc;
use std::time::Duration;

use config::NetworkInterface;
use mmds::{Service, Stack};
use net::FrameInterceptor;
use virtio::worker::Nanos;

/// Answers the frames of `network` that are for `service`. `None` if the interface does not lead to
/// the service.
pub(super) fn interceptor(
    service: Option<&Arc<Service>>,
    network: &NetworkInterface,
    now: Nanos,
) -> Option<Box<dyn FrameInterceptor>> {
    let stack = Stack::for_interface(service?, &network.iface_id, network.mtu, Duration::from_nanos(now))?;
    Some(Box::new(MmdsInterceptor(stack)))
}

/// Passes calls on to the TCP/IP stack, which measures time by `Duration` instead of [`Nanos`].
struct MmdsInterceptor(Stack);

impl FrameInterceptor for MmdsInterceptor {
    fn wants(&self, head: &[u8]) -> bool {
        self.0.wants(head)
    }

    fn push(&mut self, frame: &[u8], now: Nanos) {
        self.0.push(frame, Duration::from_nanos(now));
    }

    fn pop(&mut self, frame: &mut Vec<u8>, now: Nanos) -> bool {
        self.0.pop(frame, Duration::from_nanos(now))
    }

    fn deadline(&mut self, now: Nanos) -> Option<Nanos> {
        let deadline = self.0.deadline(Duration::from_nanos(now))?;
        Some(u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX))
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}
