//! A network interface's way to the metadata service.

use std::sync::Arc;
use std::time::Duration;

use config::NetworkInterface;
use mmds::{Service, Stack};
use net::FrameInterceptor;
use virtio::worker::Nanos;

/// The way from `network` to `service`, if it has one.
pub(super) fn interceptor(
    service: Option<&Arc<Service>>,
    network: &NetworkInterface,
    now: Nanos,
) -> Option<Box<dyn FrameInterceptor>> {
    let stack = Stack::for_interface(service?, &network.iface_id, network.mtu, Duration::from_nanos(now))?;
    Some(Box::new(Metadata(stack)))
}

/// The service as a network device knows it: the same calls, with another measure of time.
struct Metadata(Stack);

impl FrameInterceptor for Metadata {
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
