//! The whole-system tests: built once, run on a host, and followed through the records that the
//! runner on the host writes. When the emulated host dies, a new one runs the remaining tests.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vesta_tests::guest::env;
use vesta_tests::soak;

use super::build;
use super::inner::show;
use super::record::{Plan, Record, Test, Verdict, read, unfinished};
use super::tally::Tally;
use crate::apt;
use crate::clients;
use crate::host::emulated::{Emulated, Watch};
use crate::host::{self, Job, Kind, Outcome};
use crate::kernels;
use crate::pip;
use crate::process::{root, say};
use crate::python_disk;

/// The time limit of one test. An emulated host runs code 10 to 20 times slower.
const LIMIT_NATIVE: Duration = Duration::from_mins(1);
const LIMIT_EMULATED: Duration = Duration::from_mins(3);
/// The test binary whose guests use the disk with Python.
const WITH_PYTHON: &str = "mmds";
/// The test binary that runs the example in Rust.
const WITH_EXAMPLE: &str = "examples";
/// The test binary that boots guests other than Linux.
const WITH_MEMTEST: &str = "other_guests";
/// The test binary that runs clients from package registries.
const WITH_CLIENTS: &str = "clients";
/// The test binary that holds a monitor to the description of its API.
const WITH_SCHEMATHESIS: &str = "null_schemathesis";
/// Test binaries of this kind run natively where `/dev/kvm` opens.
const NULL_GUESTS: &str = "null_";
/// How often the emulated host may die before the remaining tests fail.
const MOST_DEATHS: usize = 8;

/// Programs on the host with which tests make disks and networks.
const PROGRAMS: &[(&str, &str)] = &[
    ("mke2fs", "e2fsprogs"),
    ("losetup", "mount"),
    ("dmsetup", "dmsetup"),
    ("blockdev", "util-linux"),
    ("ip", "iproute2"),
    ("curl", "curl"),
    ("ethtool", "ethtool"),
    ("passt", "passt"),
    ("gdb", "gdb"),
];

/// Environment variables for the tests: the monitor, the kernels and busybox.
fn guest_environment(vmm: PathBuf) -> Result<Vec<(OsString, OsString)>> {
    let mut variables = vec![
        (env::VMM, vmm),
        (env::DEBIAN_6_1, kernels::debian(kernels::DEBIAN_6_1)?.image),
        (env::DEBIAN_6_12, kernels::debian(kernels::DEBIAN_6_12)?.image),
        (env::BUSYBOX, kernels::busybox()?),
    ];
    variables.extend(kernels::tuned()?.map(|kernel| (env::TUNED, kernel.image)));
    Ok(variables.into_iter().map(|(name, path)| (name.into(), path.into())).collect())
}

/// Environment variables for the tests of clients from package registries. One that cannot be
/// fetched has none; its tests are ignored.
fn registry_clients() -> Result<Vec<(OsString, OsString)>> {
    let mut variables = Vec::new();
    match clients::python() {
        Ok(dir) => variables.push((env::PYTHON_SDK.into(), dir.into())),
        Err(error) => say!("firecracker-python cannot be fetched: {error:#}"),
    }
    match clients::fetch_rust() {
        Ok(()) => variables.push((env::RUST_SDK.into(), clients::rust()?.into())),
        Err(error) => say!("firecracker-rs-sdk cannot be fetched: {error:#}"),
    }
    Ok(variables)
}

/// Runs the whole-system tests whose name contains the filter.
pub(super) fn run(filter: &str) -> Result<Tally> {
    let (tests, others): (Vec<_>, Vec<_>) =
        build::system_tests()?.into_iter().partition(|test| test.title().contains(filter));
    let mut tally = Tally { filtered_out: others.len(), ..Tally::default() };
    if tests.is_empty() {
        return Ok(tally);
    }
    apt::ensure(PROGRAMS)?;
    let mut job = Job::here(vec![])?;
    root().clone_into(&mut job.cwd);
    // `VESTA_VMM` may name another monitor, such as a build of another profile.
    let vmm = std::env::var_os(env::VMM).map_or_else(|| build::vmm(false), |path| Ok(path.into()))?;
    job.env.extend(guest_environment(vmm)?);
    job.env.push((env::RUNNER.into(), "1".into()));
    if tests.iter().any(|test| test.suite == WITH_PYTHON) {
        job.env.push((env::PYTHON_DISK.into(), python_disk::image()?.into()));
    }
    let kvm_opens = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    // It would take minutes on an emulated host.
    if kvm_opens && tests.iter().any(|test| test.suite == WITH_SCHEMATHESIS) {
        job.env.push((env::SCHEMATHESIS.into(), pip::schemathesis()?.into()));
    }
    if tests.iter().any(|test| test.suite == WITH_MEMTEST) {
        job.env.push((env::MEMTEST.into(), kernels::memtest()?.into()));
    }

    if tests.iter().any(|test| test.suite == WITH_EXAMPLE) {
        job.env.push((env::EXAMPLE.into(), build::example()?.into()));
    }

    if tests.iter().any(|test| test.suite == WITH_CLIENTS) {
        job.env.extend(registry_clients()?);
    }

    let (kind, why) = host::choose()?;
    let (null, linux): (Vec<_>, Vec<_>) =
        tests.into_iter().partition(|test| test.suite.starts_with(NULL_GUESTS));
    let (native, elsewhere) = if kvm_opens { (null, linux) } else { (vec![], [null, linux].concat()) };
    if !native.is_empty() {
        say!("whole-system tests with null guests: {} on this machine", native.len());
        tally.add(Run::new(Kind::Native, &job)?.run_all(native)?);
    }
    if !elsewhere.is_empty() {
        say!("whole-system tests: {} on {kind}: {why}", elsewhere.len());
        tally.add(Run::new(kind, &job)?.run_all(elsewhere)?);
    }
    Ok(tally)
}

/// The running of some tests on one kind of host.
struct Run<'a> {
    kind: Kind,
    job: &'a Job,
    emulated: Emulated,
    limit: Duration,
    dir: PathBuf,
}

impl Run<'_> {
    fn new(kind: Kind, job: &Job) -> Result<Run<'_>> {
        let limit = match kind {
            Kind::Native => LIMIT_NATIVE,
            Kind::Emulated => LIMIT_EMULATED,
        };
        // Beside the binaries, in a directory that the emulated host shares.
        let program = crate::process::this_program()?;
        let dir = program.parent().context("this program is in no directory")?.join("system-tests");
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let limit = limit * soak::factor();
        Ok(Run { kind, job, emulated: Emulated::default(), limit, dir })
    }

    /// Runs all tests, with a new host after each death of one.
    fn run_all(mut self, mut tests: Vec<Test>) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut suspects = BTreeSet::new();
        let mut deaths = 0;
        while !tests.is_empty() {
            let (records, outcome) = self.run_on_host(&tests)?;
            for record in &records {
                if let Record::Ended { title, verdict, .. } = record {
                    tally.count(title, verdict);
                    tests.retain(|test| test.title() != *title);
                }
            }
            if tests.is_empty() {
                break;
            }
            outcome.report();
            if matches!(outcome, Outcome::Exited(_) | Outcome::Signaled(_)) {
                bail!("the runner ended with {} tests left", tests.len());
            }
            deaths += 1;
            if let Some(title) = unfinished(&records).map(str::to_owned) {
                if suspects.insert(title.clone()) {
                    tally.notes.push(format!("the host died during {title}: it was run again"));
                } else {
                    let verdict = Verdict::Failed("the host died twice during it".to_owned());
                    show(&title, &verdict, Duration::ZERO, "");
                    tally.count(&title, &verdict);
                    tests.retain(|test| test.title() != title);
                }
            }
            if deaths > MOST_DEATHS {
                for test in &tests {
                    let verdict = Verdict::Failed("not run: too many hosts died".to_owned());
                    tally.count(&test.title(), &verdict);
                }
                break;
            }
            say!("running {} remaining tests on a new host", tests.len());
        }
        Ok(tally)
    }

    /// Runs tests on one host, until they or the host end.
    fn run_on_host(&mut self, tests: &[Test]) -> Result<(Vec<Record>, Outcome)> {
        let (plan, records) = (self.dir.join("plan"), self.dir.join("records"));
        std::fs::write(&records, "")?;
        let machine_is_ours = self.kind == Kind::Emulated;
        let content =
            serde_json::to_vec(&Plan { tests: tests.to_vec(), limit: self.limit, machine_is_ours })?;
        std::fs::write(&plan, content)?;
        let mut job = self.job.clone();
        job.argv = inner(&plan, &records)?;
        // Each test has a time limit; a machine that writes no record for longer than that hangs.
        self.emulated.timeout = (self.limit + Duration::from_secs(10)) * u32::try_from(tests.len() + 1)?;
        self.emulated.watch =
            Some(Watch { file: records.clone(), quiet: self.limit + Duration::from_mins(1) });
        let outcome = host::run(self.kind, &job, &self.emulated)?;
        Ok((read(&records)?, outcome))
    }
}

fn inner(plan: &Path, records: &Path) -> Result<Vec<OsString>> {
    Ok(vec![crate::process::this_program()?.into(), "test-inner".into(), plan.into(), records.into()])
}
