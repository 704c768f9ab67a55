//! [`Personality`]: the program that this process answers as, by the name it was started under.

use std::ffi::OsStr;
use std::path::Path;

/// The version of Firecracker whose interface this program has.
pub(crate) const API_VERSION: &str = "1.17.0";

/// The program that this process answers as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Personality {
    /// Itself.
    Vesta,
    /// Firecracker, to tools that look for that name.
    Firecracker,
}

impl Personality {
    /// The personality of this process.
    pub(crate) fn of_this_process() -> Self {
        Self::named(std::env::args_os().next().as_deref())
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

    /// The first line of every log. Tools read the name and the version.
    pub(crate) fn banner(self) -> String {
        format!("Running {} v{}", self.app_name(), self.version())
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
