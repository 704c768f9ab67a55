//! Pausing the guest of a microVM, for `PATCH /vm`, a fork or a live snapshot.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use machine::Running;
use sync::locked;

use crate::CommandError;
use crate::host::Host;
use crate::microvm::MicroVm;
use crate::task::Tasks;

/// How long a pause may take on the main thread: once for the vCPUs, once for the devices.
const QUICK_PAUSE: Duration = Duration::from_millis(20);

/// Pauses the guest. A guest that is paused already is left alone.
///
/// The usual pause takes less than a millisecond, and a thread would add to it. So only a pause
/// that takes longer than [`QUICK_PAUSE`] becomes a task.
pub(crate) fn pause<H: Host>(vm: &mut MicroVm, tasks: &mut Tasks<H>) -> Result<(), CommandError> {
    if vm.lifecycle.pause_within(QUICK_PAUSE)? { Ok(()) } else { pause_in_task(vm, tasks) }
}

/// Pauses the guest on a thread of its own: requests in flight on a slow disk take seconds. A
/// signal waits for it too, because the disks are closed in order then. It takes no longer than
/// [`VCPU_TIMEOUT`](machine::machine::VCPU_TIMEOUT) and
/// [`DRAIN_TIMEOUT`](machine::machine::DRAIN_TIMEOUT) together, and a little.
fn pause_in_task<H: Host>(vm: &mut MicroVm, tasks: &mut Tasks<H>) -> Result<(), CommandError> {
    let Some(machine) = vm.lifecycle.begin_pause() else { return Ok(()) };
    // Shared, so that the machine is not lost if the host has no thread for the task.
    let machine = Arc::new(Mutex::new(Some(machine)));
    let of_task = Arc::clone(&machine);
    let paused = tasks.run_to_end(vm, move |_| take(&of_task).map(Running::pause));
    match (paused, take(&machine)) {
        (Ok(Some(paused)), _) => vm.lifecycle.end_pause(paused),
        (Err(error), Some(machine)) => {
            vm.lifecycle.abort_pause(machine);
            Err(error.into())
        }
        (Ok(None) | Err(_), _) => Err(vm.lifecycle.lose_paused()),
    }
}

fn take(slot: &Mutex<Option<Running>>) -> Option<Running> {
    locked(slot).take()
}

/// Resumes a guest that a fork or a live snapshot paused. Not once a task was left behind: it may
/// still work with the guest's disks.
pub(crate) fn resume_after_pause<H: Host>(vm: &mut MicroVm, tasks: &Tasks<H>) -> Result<(), CommandError> {
    if tasks.left_behind() { Ok(()) } else { vm.resume() }
}
