//! The device table: every kind of virtio device that a machine can have, one row each.
//!
//! A row names the field of [`DeviceSetup`] by which a machine's owner asks for devices of the
//! kind, the type of that field, and the [adapter](super::adapters) of the kind. Everything else
//! follows from the row: the order and the names of devices, their addresses, how saved states are
//! found, decoded and checked, how many I/O workers run, and where the typed control handles are
//! kept ([`Controls`]).
//!
//! To add a device: write its crate under `crates/devices` and its structs in `config`, then an
//! adapter and a row here. Rows are in the order in which devices are numbered, which a saved guest
//! relies on: add a row at the end.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::disk::Disk;
use config::{Drive, Entropy, NetworkInterface};
use net::NetBackend;
use virtio::device::{DecodeError, Device, DeviceData, DeviceState};

use super::adapter::{BuildContext, DeviceAdapter, IoWorkers};
use super::adapters::{BlockAdapter, EntropyAdapter, NetAdapter, VsockAdapter, VsockSetup};
use super::error::DeviceError;
use super::state::DevicesState;

/// One row of the table. Rows have one type, whatever types the devices of their kinds have.
struct DeviceKind {
    /// The name of the kind in saved states ([`DeviceData::NAME`]).
    state_name: &'static str,
    /// Whether a saved state can be decoded as one of this kind.
    check_state: fn(&DeviceState) -> Result<(), DecodeError>,
    /// How many devices of the kind a setup has.
    count: fn(&DeviceSetup) -> usize,
    /// What is added to the kernel's command line for devices of the kind.
    kernel_args: fn(&DeviceSetup) -> Vec<String>,
    /// Takes the devices of the kind out of a setup, in their order.
    plan: fn(&mut DeviceSetup, Option<&DevicesState>) -> Result<PlannedDevices, DeviceError>,
}

/// The control handles of one kind by device ID. A kind without IDs has one, at [`NO_ID`].
pub(super) type Handles<C> = BTreeMap<String, C>;

/// The key of the only device of a kind without IDs.
pub(super) const NO_ID: &str = "";

macro_rules! device_table {
    ($( $(#[$doc:meta])* $field:ident: $devices:ty => $adapter:ty; )*) => {
        /// The devices that a machine is to have, with open backends.
        #[derive(Debug, Default)]
        pub struct DeviceSetup {
            $( $(#[$doc])* pub $field: $devices, )*
            /// The metadata service, to which some of the network interfaces lead.
            pub metadata: Option<Arc<mmds::Service>>,
            /// Whether all devices are on virtio-pci. Else they are on virtio-mmio.
            pub pci: bool,
        }

        /// The control handles of a machine's devices, typed by kind.
        #[derive(Default)]
        pub(super) struct Controls {
            $( pub(super) $field: Handles<<$adapter as DeviceAdapter>::Control>, )*
        }

        impl std::fmt::Debug for Controls {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct("Controls")
                    $( .field(stringify!($field), &self.$field.keys()) )*
                    .finish()
            }
        }

        const TABLE: &[DeviceKind] = &[ $( DeviceKind {
            state_name: <$adapter as DeviceAdapter>::State::NAME,
            check_state: |state| state.decode::<<$adapter as DeviceAdapter>::State>().map(drop),
            count: |setup| setup.$field.iter().count(),
            kernel_args: |setup| setup.$field.iter().filter_map(<$adapter>::kernel_args).collect(),
            plan: |setup, saved| {
                let devices = std::mem::take(&mut setup.$field);
                plan_kind::<$adapter>(devices, saved, |controls| &mut controls.$field)
            },
        }, )* ];
    };
}

device_table! {
    /// Drives, checked against each other, each with its disk.
    drives: Vec<(Drive, Disk)> => BlockAdapter;
    /// Network interfaces, checked against each other, each with its backend.
    networks: Vec<(NetworkInterface, NetBackend)> => NetAdapter;
    /// The entropy device.
    entropy: Option<Entropy> => EntropyAdapter;
    /// The socket device.
    vsock: Option<VsockSetup> => VsockAdapter;
}

/// A device that is to be built: its name, its setup and its saved state.
pub(super) trait PlannedDevice {
    /// The device's name in saved states, logs and errors.
    fn name(&self) -> &str;

    /// The I/O workers that the device needs.
    fn io_workers(&self) -> Result<IoWorkers, DeviceError>;

    /// Builds the device, and adds its control handle to `controls`.
    fn build(
        self: Box<Self>,
        context: BuildContext<'_>,
        controls: &mut Controls,
    ) -> Result<Box<dyn Device>, DeviceError>;
}

/// Devices that are to be built, in order.
pub(super) type PlannedDevices = Vec<Box<dyn PlannedDevice>>;

struct Planned<A: DeviceAdapter> {
    name: String,
    setup: A::Setup,
    state: Option<A::State>,
    handles: fn(&mut Controls) -> &mut Handles<A::Control>,
}

impl<A: DeviceAdapter> PlannedDevice for Planned<A> {
    fn name(&self) -> &str {
        &self.name
    }

    fn io_workers(&self) -> Result<IoWorkers, DeviceError> {
        A::io_workers(&self.setup, self.state.as_ref()).map_err(DeviceError::Build)
    }

    fn build(
        self: Box<Self>,
        context: BuildContext<'_>,
        controls: &mut Controls,
    ) -> Result<Box<dyn Device>, DeviceError> {
        let id = A::id(&self.setup).unwrap_or(NO_ID).to_owned();
        let built = match &self.state {
            Some(state) => A::restore(self.setup, state, context),
            None => A::new(self.setup, context),
        };
        let (device, control) = built.map_err(DeviceError::Build)?;
        (self.handles)(controls).insert(id, control);
        Ok(device)
    }
}

/// The name of a device in saved states, logs and errors.
pub(super) fn device_name(noun: &str, id: &str) -> String {
    if id == NO_ID { noun.to_owned() } else { format!("{noun} {id}") }
}

/// Plans the devices of one kind: gives each its name and decodes its saved state.
fn plan_kind<A: DeviceAdapter>(
    devices: impl IntoIterator<Item = A::Setup>,
    saved: Option<&DevicesState>,
    handles: fn(&mut Controls) -> &mut Handles<A::Control>,
) -> Result<PlannedDevices, DeviceError> {
    let mut devices: Vec<_> = devices.into_iter().collect();
    devices.sort_by_key(|setup| !A::is_first(setup));
    let plan = |setup| {
        let name = device_name(A::NOUN, A::id(&setup).unwrap_or(NO_ID));
        let state = saved.and_then(|saved| saved.device(&name)).map(DeviceState::decode).transpose();
        let state = state.map_err(|source| DeviceError::State { name: name.clone(), source })?;
        Ok(Box::new(Planned::<A> { name, setup, state, handles }) as Box<dyn PlannedDevice>)
    };
    devices.into_iter().map(plan).collect()
}

/// Takes all devices out of `setup`, in the order in which they are numbered. With a saved
/// machine's devices, they are the same ones by name.
pub(super) fn plan(
    setup: &mut DeviceSetup,
    saved: Option<&DevicesState>,
) -> Result<PlannedDevices, DeviceError> {
    let mut planned = Vec::new();
    for kind in TABLE {
        planned.extend((kind.plan)(setup, saved)?);
    }
    let Some(saved) = saved else { return Ok(planned) };
    if !planned.iter().map(|device| device.name()).eq(saved.devices.iter().map(|device| &device.name)) {
        let here: Vec<_> = planned.iter().map(|device| device.name()).collect();
        let saved: Vec<_> = saved.devices.iter().map(|device| device.name.as_str()).collect();
        return Err(DeviceError::OtherDevices { here: here.join(", "), saved: saved.join(", ") });
    }
    Ok(planned)
}

impl DeviceSetup {
    /// How many devices there are.
    pub(super) fn count(&self) -> usize {
        TABLE.iter().map(|kind| (kind.count)(self)).sum()
    }

    /// What is added to the kernel's command line for the devices, wherever they are.
    pub(super) fn kernel_args(&self) -> Vec<String> {
        TABLE.iter().flat_map(|kind| (kind.kernel_args)(self)).collect()
    }
}

impl DevicesState {
    /// Checks that the table has a kind for each device, and that each state can be decoded as one
    /// of its kind.
    pub fn check(&self) -> Result<(), DeviceError> {
        for saved in &self.devices {
            let (name, state) = (|| saved.name.clone(), saved.device());
            let Some(kind) = TABLE.iter().find(|kind| kind.state_name == state.name()) else {
                return Err(DeviceError::UnknownKind { name: name(), kind: state.name().to_owned() });
            };
            (kind.check_state)(state).map_err(|source| DeviceError::State { name: name(), source })?;
        }
        Ok(())
    }
}
