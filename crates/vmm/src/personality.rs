//! [`Personality`]: the program that this process answers as, by the name it was started under, and
//! everything that this changes: names, versions, and the lines of the log about the beginning and
//! the end of a monitor. Clients of Firecracker wait for some of these.
//!
//! The lines about requests of the API are the same under every name (`control::api`).

use std::ffi::OsStr;
use std::path::Path;
use std::sync::OnceLock;

/// The target of lines about the process, which is Firecracker's.
const MAIN: &str = "firecracker";

/// The beginning of Firecracker's line about a signal that ends it. The signal's number follows.
pub(crate) const SHUTDOWN_BY_SIGNAL: &str = "Shutting down VM after intercepting signal ";

/// The version of Firecracker whose interface this program has.
pub(crate) const API_VERSION: &str = "1.17.0";

/// The personality of this process, once it is known.
static CURRENT: OnceLock<Personality> = OnceLock::new();

/// The program that this process answers as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Personality {
    /// Itself.
    Vesta,
    /// Firecracker, to tools that look for that name.
    Firecracker,
}

impl Personality {
    /// The personality of this process. The first call reads the command line; later ones take no
    /// lock and allocate nothing, so a signal handler may make them.
    pub(crate) fn of_this_process() -> Self {
        *CURRENT.get_or_init(|| Self::named(std::env::args_os().next().as_deref()))
    }

    fn named(program: Option<&OsStr>) -> Self {
        match program.map(Path::new).and_then(Path::file_name) {
            Some(name) if name == "firecracker" => Personality::Firecracker,
            _ => Personality::Vesta,
        }
    }

    /// `app_name` in the API.
    pub(crate) fn app_name(self) -> &'static str {
        match self {
            Personality::Vesta => "vesta-vmm",
            Personality::Firecracker => "Firecracker",
        }
    }

    /// `vmm_version` in the API.
    pub(crate) fn version(self) -> &'static str {
        match self {
            Personality::Vesta => env!("CARGO_PKG_VERSION"),
            Personality::Firecracker => API_VERSION,
        }
    }

    /// What `--version` prints. Tools read the second word of the first line.
    pub(crate) fn version_text(self) -> String {
        match self {
            Personality::Vesta => format!("vesta-vmm v{} (Firecracker API v{API_VERSION})\n", self.version()),
            Personality::Firecracker => format!("Firecracker v{API_VERSION}\n\n"),
        }
    }

    /// Leaves the API's and the vsock device's sockets in place at the end of this process, where
    /// clients expect that.
    pub(crate) fn settle_sockets(self) {
        if self == Personality::Firecracker {
            control::api::leave_all_sockets();
        }
    }

    /// Logs the first line, as any line of level Info. Tools read the name and the version.
    pub(crate) fn log_start(self) {
        log::info!(target: MAIN, "Running {} v{}", self.app_name(), self.version());
    }

    /// Logs that the microVM of the configuration file runs.
    pub(crate) fn log_start_from_file(self) {
        if self == Personality::Firecracker {
            log::info!(target: MAIN, "Successfully started microvm that was configured from one single json");
        }
    }

    /// Logs that the metadata service has the contents of the file.
    pub(crate) fn log_metadata_from_file(self) {
        if self == Personality::Firecracker {
            log::info!(target: "vmm::resources", "Successfully added metadata to mmds from file");
        }
    }

    /// Logs that the guest has ended. Why is in a line of its own.
    pub(crate) fn log_stop(self) {
        if self == Personality::Firecracker {
            log::info!(target: "vmm", "Vmm is stopping.");
        }
    }

    /// Logs that a signal asked this process to end. `code` is its `si_code`.
    pub(crate) fn log_signal(self, signal: i32, code: i32) {
        match self {
            Personality::Vesta => log::info!(target: MAIN, "ended by signal {signal}"),
            Personality::Firecracker => {
                log::error!(target: "vmm::signal_handler", "{SHUTDOWN_BY_SIGNAL}{signal}, code {code}.");
            }
        }
    }

    /// Logs the last line, with the exit status.
    pub(crate) fn log_exit(self, status: i32) {
        match (self, status) {
            (Personality::Vesta, 0) => log::info!(target: MAIN, "exiting: exit_code=0"),
            (Personality::Vesta, _) => {
                log::error!(target: MAIN, "exiting with an error: exit_code={status}");
            }
            (Personality::Firecracker, 0) => {
                log::info!(target: MAIN, "Firecracker exiting successfully. exit_code=0");
            }
            (Personality::Firecracker, _) => {
                log::error!(target: MAIN, "Firecracker exiting with error. exit_code={status}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_name_decides_in_every_directory() {
        let named = |name: &str| Personality::named(Some(OsStr::new(name)));
        assert_eq!(named("/usr/bin/firecracker"), Personality::Firecracker);
        assert_eq!(named("firecracker"), Personality::Firecracker);
        assert_eq!(named("/opt/firecracker/vesta-vmm"), Personality::Vesta);
        assert_eq!(Personality::named(None), Personality::Vesta);
    }

    #[test]
    fn firecrackers_version_is_the_second_word() {
        let text = Personality::Firecracker.version_text();
        assert_eq!(text.lines().next().unwrap().split(' ').nth(1), Some("v1.17.0"));
    }
}
