//! The entropy device: the `entropy` crate.

use config::Entropy as EntropyConfig;
use entropy::{Entropy, EntropyControl, EntropyState};

use crate::devices::adapter::{BuildContext, BuildError, Built, DeviceAdapter, IoWorkers, limits};

/// Adapts the entropy device.
pub(crate) struct EntropyAdapter;

impl DeviceAdapter for EntropyAdapter {
    const NOUN: &'static str = "entropy";
    type Setup = EntropyConfig;
    type State = EntropyState;
    type Control = EntropyControl;

    fn id(_setup: &EntropyConfig) -> Option<&str> {
        None
    }

    fn io_workers(_setup: &EntropyConfig, _state: Option<&EntropyState>) -> Result<IoWorkers, BuildError> {
        Ok(IoWorkers::Shared(1))
    }

    fn new(setup: EntropyConfig, context: BuildContext<'_>) -> Built<EntropyControl> {
        let (device, control) = Entropy::new(limits(setup.rate_limiter.as_ref()), context.now);
        Ok((Box::new(device), control))
    }

    fn restore(
        _setup: EntropyConfig,
        state: &EntropyState,
        context: BuildContext<'_>,
    ) -> Built<EntropyControl> {
        let (device, control) = Entropy::restore(state, context.now);
        Ok((Box::new(device), control))
    }
}
