//! Drives: the `block` crate.

use block::disk::Disk;
use block::{Block, BlockConfig, BlockControl, BlockState};
use config::Drive;

use crate::devices::adapter::{BuildContext, BuildError, Built, DeviceAdapter, IoWorkers, limits};

/// Adapts drives. The root drive comes first, so that it is the guest's `/dev/vda`.
pub(crate) struct BlockAdapter;

impl DeviceAdapter for BlockAdapter {
    const NOUN: &'static str = "drive";
    type Setup = (Drive, Disk);
    type State = BlockState;
    type Control = BlockControl;

    fn id((drive, _): &Self::Setup) -> Option<&str> {
        Some(&drive.drive_id)
    }

    fn is_first((drive, _): &Self::Setup) -> bool {
        drive.is_root_device
    }

    fn kernel_args((drive, _): &Self::Setup) -> Option<String> {
        drive.is_root_device.then(|| {
            let mode = if drive.is_read_only { "ro" } else { "rw" };
            match &drive.partuuid {
                Some(uuid) => format!("root=PARTUUID={uuid} {mode}"),
                None => format!("root=/dev/vda {mode}"),
            }
        })
    }

    fn io_workers((drive, disk): &Self::Setup, state: Option<&BlockState>) -> Result<IoWorkers, BuildError> {
        if !disk.wants_own_workers() {
            return Ok(IoWorkers::Shared(drive.io_threads()));
        }
        match state {
            // The count is read from a file: checked before threads are created for it.
            Some(state) => {
                state.config.check()?;
                Ok(IoWorkers::Dedicated(state.config.io_threads))
            }
            None => Ok(IoWorkers::Dedicated(drive.io_threads())),
        }
    }

    fn new((drive, disk): Self::Setup, context: BuildContext<'_>) -> Built<BlockControl> {
        let limits = limits(drive.rate_limiter.as_ref());
        let config = BlockConfig::of(&drive);
        let (device, control) = Block::new(config, disk, limits, context.workers, context.now)?;
        Ok((Box::new(device), control))
    }

    fn restore((_, disk): Self::Setup, state: &BlockState, context: BuildContext<'_>) -> Built<BlockControl> {
        let (device, control) = Block::restore(state, disk, context.workers, context.now)?;
        Ok((Box::new(device), control))
    }
}
