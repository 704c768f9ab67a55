//! Booting a guest: the kernel's files, and `InstanceStart`.

use std::fs::File;
use std::path::Path;

use config::BootSource;
use machine::boot::BootFiles;
use machine::legacy::{Output, SerialSetup};
use machine::{Paused, Setup};
use rustix::fs::{Mode, OFlags};

use crate::CommandError;
use crate::error::Source;
use crate::events::{Event, StartedBy};
use crate::host::Host;
use crate::microvm::{MicroVm, serial_limit};
use crate::settings::Settings;
use crate::task::Tasks;
use crate::token::Token;

/// The files of the boot source, opened when it was set.
#[derive(Debug)]
pub(crate) struct OpenedBootFiles {
    kernel: File,
    initrd: Option<File>,
}

/// Opens what `source` names.
pub(crate) fn open_boot_source<H: Host>(
    vm: &MicroVm,
    tasks: &mut Tasks<H>,
    source: &BootSource,
) -> Result<OpenedBootFiles, CommandError> {
    source.check()?;
    let (kernel, initrd) = (source.kernel_image_path.clone(), source.initrd_path.clone());
    tasks.run(vm, None, move |_| {
        let kernel = open("kernel image", &kernel)?;
        let initrd = initrd.as_deref().map(|path| open("initrd", path)).transpose()?;
        Ok(OpenedBootFiles { kernel, initrd })
    })?
}

/// Builds the machine and starts the guest. A start that fails can be tried again.
pub(crate) fn start<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    files: Option<&OpenedBootFiles>,
) -> Result<(), CommandError> {
    let settings = &vm.backends.settings;
    let serial = serial_setup(vm, &mut tasks.host, settings)?;
    let (Some(source), Some(files)) = (&settings.boot_source, files) else {
        return Err(CommandError::NoBootSource);
    };
    let boot = BootFiles {
        kernel: duplicate(source.kernel_image_path.as_path(), "kernel image", &files.kernel)?,
        initrd: match (&source.initrd_path, &files.initrd) {
            (Some(path), Some(file)) => Some(duplicate(path, "initrd", file)?),
            _ => None,
        },
        cmdline: source.boot_args().to_owned(),
    };
    let (machine_config, cpu_config) = (settings.machine_config.clone(), settings.cpu_config.clone());
    let boot_timer = vm.platform.boot_timer;
    let devices = vm.device_setup();
    let events = vm.lifecycle.events().map_err(CommandError::start)?;
    // It reads the kernel, from a file system that may take long.
    let build = move |_: &Token| {
        let (config, cpu_config) = (&machine_config, cpu_config.as_ref());
        Paused::build(Setup { config, cpu_config, boot, serial, boot_timer, devices, events })
    };
    let machine = tasks.run(vm, None, build)?.map_err(CommandError::start)?;
    tasks.host.guest_starts(vm.serial_output.is_none());
    vm.backends.networks.release();
    vm.metrics.guest_starts(machine.stats());
    vm.lifecycle.start(machine, true).map_err(CommandError::start)?;
    vm.events.publish(&Event::Started { by: StartedBy::Boot, phase: vm.lifecycle.phase() });
    log::info!("the guest has started");
    Ok(())
}

/// The host end of the serial port of a guest with these settings: the file that was set, else
/// standard input and output.
pub(crate) fn serial_setup<H: Host>(
    vm: &MicroVm,
    host: &mut H,
    settings: &Settings,
) -> Result<SerialSetup, CommandError> {
    let setup = match &vm.serial_output {
        Some(_) => vm.serial_to_file(settings),
        None => host.standard_io().map(|setup| SerialSetup { limit: serial_limit(settings), ..setup }),
    };
    setup.map_err(CommandError::Serial)
}

/// Opens the file or FIFO that takes the output of the serial port.
pub(crate) fn open_serial(path: &Path) -> Result<Output, CommandError> {
    Output::open(path).map_err(|error| CommandError::open("serial output", path, error))
}

/// Opens a file or block device that is to be read. Any other kind of file is an error at once: a
/// FIFO may have no writer yet, and a character device need not have an end.
fn open(what: &'static str, path: &Path) -> Result<File, CommandError> {
    let failed = |error: Source| CommandError::open(what, path, error);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?);
    use_blocking(&file).map_err(failed)?;
    Ok(file)
}

/// Checks the kind of a file that was opened without waiting, and lets reads of it wait.
fn use_blocking(file: &File) -> Result<(), Source> {
    use std::os::unix::fs::FileTypeExt;
    let kind = file.metadata()?.file_type();
    let found = match kind {
        _ if kind.is_file() || kind.is_block_device() => None,
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_fifo() => Some("a FIFO"),
        _ => Some("a character device"),
    };
    if let Some(found) = found {
        return Err(format!("it is {found}; it must be a file or a block device").into());
    }
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags - OFlags::NONBLOCK)?;
    Ok(())
}

/// Another descriptor of an opened file, so that a start that fails can be tried again.
fn duplicate(path: &Path, what: &'static str, file: &File) -> Result<File, CommandError> {
    file.try_clone().map_err(|error| CommandError::open(what, path, error))
}
