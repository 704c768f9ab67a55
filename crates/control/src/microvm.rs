//! [`MicroVm`]: everything that one microVM consists of, and the answers to questions about it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use config::FullVmConfig;
use machine::EventSink;
use machine::debug::KeptOut;
use machine::devices::{DeviceSetup, limits};
use machine::legacy::{Output, SerialSetup};
use machine::machine::Machine;
use virtio::rate_limiter::RateLimiterConfig;

use crate::backends::Backends;
use crate::events::{Event, EventLog};
use crate::instance::to_json;
use crate::lifecycle::Lifecycle;
use crate::live_snapshot::LiveSnapshotJob;
use crate::metadata::Metadata;
use crate::metrics::{self, Group, Metrics, Of, Value};
use crate::openapi::OPENAPI;
use crate::prefetch::WorkingSetTask;
use crate::settings::Settings;
use crate::task::Questions;
use crate::{Command, CommandError, Instance, Platform, Reply};

/// One microVM: its identity, its configuration with open backends, and its machine.
#[derive(Debug)]
pub(crate) struct MicroVm {
    pub(crate) instance: Arc<Instance>,
    pub(crate) platform: Platform,
    pub(crate) backends: Backends,
    /// The file or FIFO of `settings.serial`, opened when it was set.
    pub(crate) serial_output: Option<Output>,
    /// The contents of the metadata service, and how the guest reaches it.
    pub(crate) metadata: Metadata,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: Metrics,
    /// What happened to the microVM, for clients that watch it.
    pub(crate) events: EventLog,
    /// The live snapshot that is being written, or was written last.
    pub(crate) live_snapshot: Option<LiveSnapshotJob>,
    /// Records or prefetches the working set of a restored guest.
    pub(crate) working_set: Option<WorkingSetTask>,
}

impl MicroVm {
    /// A microVM that is not configured yet. `sink` is for its machine.
    pub(crate) fn new(
        instance: Arc<Instance>,
        platform: Platform,
        sink: EventSink,
        events: EventLog,
    ) -> Self {
        let mut backends = Backends::default();
        backends.drives.report_failures(sink.notices());
        MicroVm {
            instance,
            platform,
            backends,
            serial_output: None,
            metadata: Metadata::new(platform.mmds_size_limit),
            lifecycle: Lifecycle::new(sink),
            metrics: Metrics::new(),
            events,
            live_snapshot: None,
            working_set: None,
        }
    }

    /// The devices to build, with clones of their backends.
    pub(crate) fn device_setup(&self) -> DeviceSetup {
        self.backends.device_setup(self.metadata.service(&self.instance.identity().id), self.platform.pci)
    }

    /// The host end of the serial port for a guest with these settings: the file that was set, else
    /// none. There is no input.
    pub(crate) fn serial_to_file(&self, settings: &Settings) -> std::io::Result<SerialSetup> {
        let output = self.serial_output.as_ref().map(Output::try_clone).transpose()?;
        Ok(SerialSetup { output, input: None, limit: serial_limit(settings) })
    }

    /// Keeps debuggers out of the guest as long as the value lives. An error if one is attached.
    pub(crate) fn keep_debugger_out(&self) -> Result<Option<KeptOut>, CommandError> {
        let machine = self.lifecycle.machine();
        Ok(machine.map(Machine::keep_debugger_out).transpose()?.flatten())
    }

    /// Reads how far the live snapshot is, and publishes it if there is something new.
    pub(crate) fn publish_snapshot_job(&mut self) {
        if let Some(news) = self.live_snapshot.as_mut().and_then(LiveSnapshotJob::news) {
            self.events.publish(&Event::Snapshot(news));
        }
    }

    /// Resumes the guest, if it is paused.
    pub(crate) fn resume(&mut self) -> Result<(), CommandError> {
        self.working_set.iter_mut().for_each(WorkingSetTask::guest_runs);
        self.lifecycle.resume()
    }

    /// The configuration as `GET /vm/config` shows it.
    fn shown_config(&self) -> FullVmConfig {
        let Backends { settings, drives, networks, .. } = &self.backends;
        let config = settings.with(drives.shown(), networks.configs()).in_force();
        FullVmConfig { metrics: self.metrics.config(), ..config }
    }

    /// The totals of all counters as Prometheus text.
    fn prometheus(&self) -> Reply {
        let mut own = Vec::new();
        for (drive, _) in self.backends.drives.iter() {
            let Some(overlay) = &drive.overlay else { continue };
            let layers = Value::Store(overlay.layers.len() as u64 + 1);
            let of = Of::Device { label: "drive", id: drive.drive_id.clone() };
            own.push(Group { name: "overlay", of, fields: vec![("layers", layers)] });
        }
        let prefetched = self.working_set.as_ref().and_then(WorkingSetTask::prefetched_pages);
        own.extend(prefetched.map(|pages| Group::counts("prefetch", &[("pages", pages)])));
        let info = [
            ("id", &*self.instance.identity().id),
            ("state", self.lifecycle.phase().name()),
            ("version", self.instance.identity().version),
        ];
        Reply::Text { content_type: metrics::CONTENT_TYPE, body: self.metrics.prometheus(&info, own).into() }
    }
}

impl Questions for MicroVm {
    fn tick(&self) -> Option<Duration> {
        self.metrics.tick()
    }

    fn answer(&self, command: &Command) -> Option<Result<Reply, CommandError>> {
        Some(match command {
            Command::DescribeInstance | Command::GetVersion => return self.instance.answer(command),
            Command::GetOpenApi => {
                Ok(Reply::Text { content_type: "application/json", body: Cow::Borrowed(OPENAPI) })
            }
            Command::GetMachineConfig => to_json(&self.backends.settings.machine_config),
            Command::GetVmConfig => to_json(&self.shown_config()),
            Command::GetMetrics => Ok(self.prometheus()),
            Command::GetMmds => self.metadata.get(self.lifecycle.has_started()).map(Reply::Json),
            _ => return None,
        })
    }
}

/// The rate limit of the serial port's output.
pub(crate) fn serial_limit(settings: &Settings) -> RateLimiterConfig {
    let bucket = settings.serial.as_ref().and_then(|serial| serial.rate_limiter);
    limits(Some(&config::RateLimiter { bandwidth: bucket, ops: None }))
}
