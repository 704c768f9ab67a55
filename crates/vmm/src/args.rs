//! The command line, which is Firecracker's: `--name value` or `--name=value`, each at most once.

use std::ffi::OsString;
use std::path::PathBuf;

use config::{InstanceId, LogLevel, Logger};
use lexopt::prelude::*;
use machine::legacy::StartTimes;

use crate::cpu_template_tool;
use crate::flags::{ArgsError, Parser, once, text};
use crate::overlay_tool;
use crate::personality::Personality;
use crate::restore::{self, Restore};
use crate::snapshot_tool::Tool;
use crate::snapshot_tool::args as tool;
use crate::snapshot_tool::program::Program;

/// The API socket if no flag names one.
const DEFAULT_API_SOCKET: &str = "/run/firecracker.socket";
const DEFAULT_ID: &str = "anonymous-instance";
const DEFAULT_MAX_PAYLOAD: usize = 51200;

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Invocation {
    Run(Box<Args>),
    Help,
    Version,
    /// Print the version of the state files' format.
    SnapshotVersion,
    /// Print the version of this state file's format, and its contents.
    DescribeSnapshot(PathBuf),
    /// Run a snapshot tool, without a microVM.
    SnapshotTool(Tool),
    /// Run a tool for overlay files, without a microVM.
    OverlayTool(overlay_tool::Tool),
    /// Run a tool for CPU templates, without a guest.
    CpuTemplateTool(cpu_template_tool::Tool),
}

/// The options of a microVM's process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    /// The API socket; `None` for no API.
    pub(crate) api_socket: Option<PathBuf>,
    pub(crate) config_file: Option<PathBuf>,
    /// The snapshot to restore; never together with `config_file`.
    pub(crate) restore: Option<Restore>,
    pub(crate) id: String,
    pub(crate) logger: Logger,
    /// The output of metrics.
    pub(crate) metrics_path: Option<PathBuf>,
    pub(crate) boot_timer: bool,
    /// Whether devices are on virtio-pci instead of virtio-mmio.
    pub(crate) pci: bool,
    /// The file of seccomp filters, which has no effect.
    pub(crate) seccomp_filter: Option<PathBuf>,
    /// Largest body of an API request, in bytes.
    pub(crate) max_payload: usize,
    /// The file with the first contents of the metadata service.
    pub(crate) metadata: Option<PathBuf>,
    /// Largest contents of the metadata service, in bytes of JSON.
    pub(crate) mmds_size_limit: usize,
    /// The inherited descriptor that learns when this process is ready.
    pub(crate) events_fd: Option<u32>,
    start_time_us: Option<u64>,
    start_time_cpu_us: Option<u64>,
    parent_cpu_time_us: Option<u64>,
}

impl Args {
    /// The start times for the boot timer. A parent's measurements before it started this process
    /// take precedence over `now`.
    pub(crate) fn start_times(&self, now: StartTimes) -> StartTimes {
        let parent_cpu = self.parent_cpu_time_us.unwrap_or(0);
        StartTimes {
            wall_us: self.start_time_us.unwrap_or(now.wall_us),
            cpu_us: self.start_time_cpu_us.map_or(now.cpu_us, u64::cast_signed) - parent_cpu.cast_signed(),
        }
    }
}

/// The flags, for `--help`.
const FLAGS: [(&str, &str); 23] = [
    ("--api-sock PATH", "serve the API on this Unix socket (/run/firecracker.socket)"),
    ("--no-api", "serve no API; needs --config-file or --restore"),
    ("--config-file PATH", "configure the microVM from this JSON file and start it"),
    ("--id ID", "the microVM's id: 1 to 64 letters, digits and hyphens (anonymous-instance)"),
    ("--boot-timer", "give the guest a boot timer; log when it writes to it"),
    ("--log-path PATH", "log to this file or FIFO instead of standard output"),
    ("--level LEVEL", "log this level and more severe ones: Off, Trace, Debug, Info, Warn, Error (Info)"),
    ("--module MODULE", "log only lines of modules with this prefix"),
    ("--show-level", "show the level in each line of the log"),
    ("--show-log-origin", "show the source file and line in each line of the log"),
    ("--metrics-path PATH", "write lines of metrics to this file or FIFO"),
    ("--http-api-max-payload-size N", "largest body of an API request, in bytes (51200)"),
    ("--metadata PATH", "let the guest read this JSON file from the metadata service"),
    (
        "--mmds-size-limit N",
        "longest contents of the metadata service, in bytes of JSON (the largest body of a request)",
    ),
    (
        "--events-fd N",
        "write \"A\" to this inherited descriptor when the API answers, and \"R\" when the guest runs",
    ),
    ("--enable-pci", "put virtio devices on PCI instead of virtio-mmio"),
    ("--no-seccomp", "accepted; this version installs no filters"),
    ("--seccomp-filter FILE", "accepted with a warning; this version installs no filters"),
    (
        "--start-time-us N, --start-time-cpu-us N, --parent-cpu-time-us N",
        "start times for the boot timer, set by a jailer",
    ),
    ("--snapshot-version", "print the version of the state files that this version writes, and exit"),
    ("--describe-snapshot FILE", "print the version and the contents of a state file, and exit"),
    ("--version", "print the version and exit"),
    ("--help", "print this and exit"),
];

/// What `--help` prints.
pub(crate) fn help(personality: Personality) -> String {
    let listed = |flags: &[(&str, &str)]| -> String {
        flags.iter().flat_map(|(flag, what)| ["  ", *flag, "\n        ", *what, "\n"]).collect()
    };
    format!(
        "{}\nOne process, one microVM on Linux/KVM.\n\n{}\nRestoring a snapshot:\n\n{}\nTools for snapshots: vesta-vmm snapshot --help\nTools for overlays: vesta-vmm overlay --help\nTools for CPU templates: vesta-vmm cpu-template --help\n",
        personality.version_text().trim_end(),
        listed(&FLAGS),
        listed(&restore::FLAGS)
    )
}

/// Reads a command line, the program's name first.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, ArgsError> {
    let mut parser = Parser::new(args);
    if let Some(program) = Program::named(parser.bin_name()) {
        return tool::parse_as(program, parser.into_tool()).map(Invocation::SnapshotTool);
    }
    if cpu_template_tool::args::is_program(parser.bin_name()) {
        return cpu_template_tool::args::parse_program(parser.into_tool()).map(Invocation::CpuTemplateTool);
    }
    let mut raw = RawArgs::default();
    let mut first = true;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("help") | Short('h') => return Ok(Invocation::Help),
            Long("version") | Short('V') => return Ok(Invocation::Version),
            Long("snapshot-version") => return Ok(Invocation::SnapshotVersion),
            Long("describe-snapshot") => return Ok(Invocation::DescribeSnapshot(parser.value()?.into())),
            Value(word) if first && word == "snapshot" => {
                return tool::parse(parser.into_tool()).map(Invocation::SnapshotTool);
            }
            Value(word) if first && word == "overlay" => {
                return overlay_tool::args::parse(parser.into_tool()).map(Invocation::OverlayTool);
            }
            Value(word) if first && word == "cpu-template" => {
                return cpu_template_tool::args::parse(parser.into_tool()).map(Invocation::CpuTemplateTool);
            }
            Long("api-sock") => once(&mut raw.api_socket, "api-sock", parser.value()?.into())?,
            Long("config-file") => once(&mut raw.config_file, "config-file", parser.value()?.into())?,
            Long("id") => once(&mut raw.id, "id", text("id", parser.value()?)?)?,
            Long("log-path") => once(&mut raw.logger.log_path, "log-path", parser.value()?.into())?,
            Long("metrics-path") => once(&mut raw.metrics_path, "metrics-path", parser.value()?.into())?,
            Long("level") => once(&mut raw.logger.level, "level", level(parser.value()?)?)?,
            Long("module") => once(&mut raw.logger.module, "module", text("module", parser.value()?)?)?,
            Long("show-level") => once(&mut raw.logger.show_level, "show-level", true)?,
            Long("show-log-origin") => once(&mut raw.logger.show_log_origin, "show-log-origin", true)?,
            Long("no-api") => once(&mut raw.no_api, "no-api", ())?,
            Long("boot-timer") => once(&mut raw.boot_timer, "boot-timer", ())?,
            Long("enable-pci") => once(&mut raw.pci, "enable-pci", ())?,
            Long("no-seccomp") => once(&mut raw.no_seccomp, "no-seccomp", ())?,
            Long("seccomp-filter") => {
                once(&mut raw.seccomp_filter, "seccomp-filter", parser.value()?.into())?;
            }
            Long("metadata") => once(&mut raw.metadata, "metadata", parser.value()?.into())?,
            Long("mmds-size-limit") => {
                const NAME: &str = "mmds-size-limit";
                once(&mut raw.mmds_size_limit, NAME, number(NAME, parser.value()?)?)?;
            }
            Long("http-api-max-payload-size") => {
                const NAME: &str = "http-api-max-payload-size";
                once(&mut raw.max_payload, NAME, number(NAME, parser.value()?)?)?;
            }
            Long("events-fd") => {
                once(&mut raw.events_fd, "events-fd", descriptor("events-fd", parser.value()?)?)?;
            }
            Long("start-time-us") => {
                once(&mut raw.start_time_us, "start-time-us", number("start-time-us", parser.value()?)?)?;
            }
            Long("start-time-cpu-us") => {
                const NAME: &str = "start-time-cpu-us";
                once(&mut raw.start_time_cpu_us, NAME, number(NAME, parser.value()?)?)?;
            }
            Long("parent-cpu-time-us") => {
                const NAME: &str = "parent-cpu-time-us";
                once(&mut raw.parent_cpu_time_us, NAME, number(NAME, parser.value()?)?)?;
            }
            Long(name) => {
                let name = name.to_owned();
                if !raw.restore.take(&name, &mut parser)? {
                    return Err(Long(&name).unexpected().into());
                }
            }
            other => return Err(other.unexpected().into()),
        }
        first = false;
    }
    raw.into_args().map(|args| Invocation::Run(Box::new(args)))
}

/// The flags that were read so far.
#[derive(Default)]
struct RawArgs {
    api_socket: Option<PathBuf>,
    config_file: Option<PathBuf>,
    restore: restore::RawRestoreArgs,
    id: Option<String>,
    logger: Logger,
    metrics_path: Option<PathBuf>,
    no_api: Option<()>,
    boot_timer: Option<()>,
    no_seccomp: Option<()>,
    seccomp_filter: Option<PathBuf>,
    pci: Option<()>,
    max_payload: Option<u64>,
    metadata: Option<PathBuf>,
    mmds_size_limit: Option<u64>,
    events_fd: Option<u32>,
    start_time_us: Option<u64>,
    start_time_cpu_us: Option<u64>,
    parent_cpu_time_us: Option<u64>,
}

impl RawArgs {
    fn into_args(self) -> Result<Args, ArgsError> {
        let restore = self.restore.into_restore()?;
        match (&self.config_file, &restore) {
            (None, None) if self.no_api.is_some() => return Err(ArgsError::NoApiWithoutConfig),
            (Some(_), Some(_)) => return Err(ArgsError::TwoStarts),
            _ => {}
        }
        if self.no_seccomp.is_some() && self.seccomp_filter.is_some() {
            return Err(ArgsError::Conflict("seccomp-filter", "no-seccomp"));
        }
        let id = self.id.unwrap_or_else(|| DEFAULT_ID.to_owned());
        if let Err(error) = id.parse::<InstanceId>() {
            return Err(ArgsError::Value { name: "id", value: id, reason: error.to_string() });
        }
        let bytes = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let max_payload = self.max_payload.map_or(DEFAULT_MAX_PAYLOAD, bytes);
        let api_socket = self.api_socket.unwrap_or_else(|| DEFAULT_API_SOCKET.into());
        Ok(Args {
            api_socket: self.no_api.is_none().then_some(api_socket),
            config_file: self.config_file,
            restore,
            id,
            logger: self.logger,
            metrics_path: self.metrics_path,
            boot_timer: self.boot_timer.is_some(),
            pci: self.pci.is_some(),
            seccomp_filter: self.seccomp_filter,
            max_payload,
            metadata: self.metadata,
            mmds_size_limit: self.mmds_size_limit.map_or(max_payload, bytes),
            events_fd: self.events_fd,
            start_time_us: self.start_time_us,
            start_time_cpu_us: self.start_time_cpu_us,
            parent_cpu_time_us: self.parent_cpu_time_us,
        })
    }
}

fn number(name: &'static str, value: OsString) -> Result<u64, ArgsError> {
    let value = text(name, value)?;
    value.parse().map_err(|_| ArgsError::Value {
        name,
        value,
        reason: format!("it must be a whole number between 0 and {}", u64::MAX),
    })
}

fn descriptor(name: &'static str, value: OsString) -> Result<u32, ArgsError> {
    let value = text(name, value)?;
    value.parse().map_err(|_| ArgsError::Value {
        name,
        value,
        reason: "it must be the number of a descriptor".to_owned(),
    })
}

fn level(value: OsString) -> Result<LogLevel, ArgsError> {
    let value = text("level", value)?;
    value.parse().map_err(|e: config::UnknownLogLevel| ArgsError::Value {
        name: "level",
        value,
        reason: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, ArgsError> {
        match parse(format!("vesta-vmm {line}").split_whitespace().map(OsString::from))? {
            Invocation::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_firecrackers() {
        let args = args("").unwrap();
        assert_eq!(args.api_socket, Some(DEFAULT_API_SOCKET.into()));
        assert_eq!((args.id.as_str(), args.max_payload, args.boot_timer), (DEFAULT_ID, 51200, false));
    }

    #[test]
    fn values_may_follow_an_equals_sign() {
        let args = args("--api-sock=/a --id b-1 --level=warn --config-file c").unwrap();
        assert_eq!((args.api_socket, args.id.as_str()), (Some("/a".into()), "b-1"));
        assert_eq!(args.logger.level, Some(LogLevel::Warning));
    }

    #[test]
    fn invalid_flags_are_named() {
        for (line, named) in [
            ("--nonsense", "--nonsense"),
            ("stray", "stray"),
            ("--id a --id b", "--id is given twice"),
            ("--id a_b", "a_b"),
            ("--api-sock", "--api-sock"),
            ("--level loud", "loud"),
            ("--http-api-max-payload-size -1", "-1"),
            ("--no-api", "--config-file"),
            ("--no-seccomp=yes", "yes"),
            ("--mmds-size-limit lots", "lots"),
            ("--metrics-path m --metrics-path n", "--metrics-path is given twice"),
            ("--no-seccomp --seccomp-filter f", "--seccomp-filter cannot be combined with --no-seccomp"),
            ("--seccomp-filter f --seccomp-filter g", "--seccomp-filter is given twice"),
            ("--api-sock --boot-timer", "--api-sock"),
            ("--id --", "--id"),
            ("--boot-timer stray -- --id b", "stray"),
            ("--events-fd -1", "--events-fd is \"-1\": it must be the number of a descriptor"),
            ("--events-fd 3 --events-fd 4", "--events-fd is given twice"),
        ] {
            let error = args(line).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
    }

    #[test]
    fn what_follows_two_hyphens_is_ignored() {
        assert_eq!(args("--id b -- --id c --nonsense x").unwrap().id, "b");
        assert_eq!(args("-- stray").unwrap().id, DEFAULT_ID);
        assert_eq!(args("--seccomp-filter=--f").unwrap().seccomp_filter, Some("--f".into()));
        assert_eq!(args("--log-path -f").unwrap().logger.log_path, Some("-f".into()));
    }

    #[test]
    fn metadata_limit_defaults_to_the_request_limit() {
        let limits = |line| {
            let args = args(line).unwrap();
            (args.max_payload, args.mmds_size_limit)
        };
        assert_eq!(limits(""), (51200, 51200));
        assert_eq!(limits("--http-api-max-payload-size 9"), (9, 9));
        assert_eq!(limits("--mmds-size-limit 7 --http-api-max-payload-size 9"), (9, 7));
        assert_eq!(args("--metadata m.json").unwrap().metadata, Some("m.json".into()));
    }

    #[test]
    fn no_api_needs_a_configuration_file_and_has_no_socket() {
        assert_eq!(args("--no-api --config-file c").unwrap().api_socket, None);
    }

    #[test]
    fn parents_times_count_for_the_boot_timer() {
        let now = StartTimes { wall_us: 1000, cpu_us: 100 };
        assert_eq!(args("").unwrap().start_times(now), now);
        let args = args("--start-time-us 500 --start-time-cpu-us 40 --parent-cpu-time-us 50").unwrap();
        assert_eq!(args.start_times(now), StartTimes { wall_us: 500, cpu_us: -10 });
    }
}
