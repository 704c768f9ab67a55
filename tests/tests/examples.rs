//! The examples work with a real guest.

use std::process::{Command, Output};

use anyhow::Result;
use vesta_tests::guest::{Guest, Kernel, env, required_path, vmm_path};

/// Runs an example with a guest whose first process is this script.
fn run_example(mut example: Command, script: &str) -> Result<Output> {
    let dir = tempfile::tempdir()?;
    let guest = Guest::linux(Kernel::quickest(), script, dir.path())?;
    let initrd = guest.initrd.as_deref().unwrap_or(dir.path());
    Ok(example.arg(vmm_path()).arg(&guest.kernel).arg(initrd).env("TMPDIR", dir.path()).output()?)
}

fn check(output: &Output, printed: &[&str]) {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}\n{errors}", output.status);
    for printed in printed {
        assert!(text.contains(printed), "{printed} is not in:\n{text}\n{errors}");
    }
}

#[test]
fn the_shell_example_boots_a_guest() -> Result<()> {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/boot.sh");
    let output = run_example(Command::new(example), "echo hello from the guest; poweroff -f")?;
    check(&output, &["hello from the guest"]);
    Ok(())
}

#[test]
fn the_rust_example_forks_a_running_guest() -> Result<()> {
    let output = run_example(Command::new(required_path(env::EXAMPLE)), "while :; do sleep 1; done")?;
    check(&output, &["parent: Running", "forked: ", "child: child Running"]);
    Ok(())
}
