//! `cargo xtask demo`: boots one microVM until it powers off, and shows a timeline.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vesta_tests::guest::Guest;
use vesta_tests::initramfs::Initramfs;
use vesta_tests::transcript::Line;
use vesta_tests::vmm::VmmBuilder;

use crate::host::emulated::Emulated;
use crate::host::{self, Job};
use crate::kernels;
use crate::process::{root, say};
use crate::test::build_vmm;

/// The guest's script. It writes to the boot timer first, where the kernel exposes physical memory.
const SCRIPT: &str = "\
[ -c /dev/mem ] && devmem 0xc0000000 8 123
memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
echo \"hello from Linux $(uname -r) in a microVM: $(nproc) vCPU, $memory MiB of memory\"
poweroff -f";
/// `quiet`: the kernel prints errors only.
const BOOT_ARGS: &str = "console=ttyS0 quiet panic=-1 reboot=k";
/// Texts by which the timeline finds its lines.
const HELLO: &str = "hello from Linux";
const BOOT_TIMER: &str = "Guest-boot-time";
/// What the monitor logs when the guest starts.
const STARTED: &str = "the guest has started";
/// How many lines of the console are shown.
const FIRST_LINES: usize = 5;
const LAST_LINES: usize = 10;
/// Longest wait for the guest's end.
const TIMEOUT: Duration = Duration::from_mins(2);

/// `cargo xtask demo`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    if let Some(arg) = parser.next()? {
        return Err(arg.unexpected().into());
    }
    let (kind, why) = host::choose()?;
    say!("the microVM will run on {kind}: {why}");
    say!("building vesta-vmm");
    let vmm = build_vmm(true)?;
    let (kernel, name) = kernels::preferred()?;
    say!("the guest is {name} with busybox");
    // Beside the binaries, in a directory that an emulated host shares.
    let program = crate::process::this_program()?;
    let initrd = program.with_file_name("demo-initramfs");
    std::fs::write(&initrd, Initramfs::new(&kernels::busybox()?)?.finish(SCRIPT))?;
    let argv: [OsString; 5] =
        [program.into(), "demo-inner".into(), vmm.into(), kernel.image.into(), initrd.into()];
    let mut job = Job::here(argv.to_vec())?;
    root().clone_into(&mut job.cwd);
    Ok(host::run(kind, &job, &Emulated::default())?.report())
}

/// `demo-inner VMM KERNEL INITRD`: runs on the host, so times are measured there.
pub(crate) fn inner(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (vmm, kernel, initrd) = (parser.value()?, parser.value()?, parser.value()?);
    let mut guest = Guest::bare(Path::new(&kernel)).boot_args(BOOT_ARGS);
    guest.initrd = Some(initrd.into());
    let builder = VmmBuilder::new(Path::new(&vmm))?.quiet().arg("--no-api").arg("--boot-timer");
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    let code = vmm.exit_code(TIMEOUT);
    let ended = Instant::now();
    vmm.stdout.wait_for_end(TIMEOUT)?;
    let lines = vmm.stdout.lines();
    println!("\nOutput of vesta-vmm and of the guest's serial console:\n\n{}", console(&lines));
    eprint!("{}", vmm.stderr.text());
    let code = code?;
    print!("{}", timeline(vmm.started(), &lines, ended, code));
    if !lines.iter().any(|line| line.text.contains(HELLO)) {
        bail!("the guest did not say hello");
    }
    Ok(ExitCode::from(u8::try_from(code).context("the exit code")?))
}

/// The first and the last lines of the console, so that they fit on a screen.
fn console(lines: &[Line]) -> String {
    let mut shown: Vec<String> = lines.iter().map(|line| format!("  | {}", line.text)).collect();
    let middle = FIRST_LINES..shown.len().saturating_sub(LAST_LINES).max(FIRST_LINES);
    if middle.len() > 1 {
        let left_out = format!("  . {} lines more", middle.len());
        shown.splice(middle, [left_out]);
    }
    shown.join("\n")
}

/// The steps of the guest's boot, each with its time since the monitor was started.
fn timeline(started: Instant, lines: &[Line], ended: Instant, code: i32) -> String {
    let first = |text: &str| lines.iter().find(|line| line.text.contains(text));
    let mut text = String::from("\n");
    let mut event = |at: Instant, what: &str| {
        // Infallible: it writes to a String.
        let _ = writeln!(text, "{:>10.1} ms  {what}", at.duration_since(started).as_secs_f64() * 1e3);
    };
    event(started, "vesta-vmm is started");
    if let Some(line) = first(STARTED) {
        event(line.at, "the machine is built; the guest runs its first instruction");
    }
    if let Some(line) = first(BOOT_TIMER) {
        let time =
            line.text.split_once(BOOT_TIMER).map_or("", |(_, time)| time.trim_start_matches([' ', '=']));
        event(line.at, &format!("the guest's first process runs (boot timer: {time})"));
    }
    if let Some(line) = first(HELLO) {
        event(line.at, "the guest says hello");
    }
    event(ended, &format!("the guest powered off; vesta-vmm ended with status {code}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(count: usize) -> Vec<Line> {
        (0..count).map(|number| Line { at: Instant::now(), text: format!("line {number}") }).collect()
    }

    #[test]
    fn the_middle_of_a_long_console_is_only_counted() {
        let text = console(&lines(40));
        assert_eq!(text.lines().count(), FIRST_LINES + 1 + LAST_LINES, "{text}");
        assert!(text.contains("line 4\n  . 25 lines more\n  | line 30"), "{text}");
    }

    #[test]
    fn a_short_console_is_shown_whole() {
        for count in [0, 1, FIRST_LINES + LAST_LINES] {
            assert_eq!(console(&lines(count)).lines().count(), count);
        }
    }

    #[test]
    fn the_timeline_leaves_out_what_did_not_happen() {
        let started = Instant::now();
        let at = |ms| started + Duration::from_millis(ms);
        let lines = [
            Line { at: at(5), text: "[vm:main] the guest has started".to_owned() },
            Line { at: at(20), text: "hello from Linux 6.12".to_owned() },
        ];
        let text = timeline(started, &lines, at(25), 0);
        let events: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(events.len(), 4, "{text}");
        assert!(events[1].contains("5.0 ms  the machine is built"), "{text}");
        assert!(!text.contains("boot timer"), "{text}");
    }
}
