//! The terminal on standard input: used by the guest while it runs, and restored on every exit.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use serde_json::json;
use vesta_tests::elf::{self, Elf};
use vesta_tests::guest::vmm_path;

/// A terminal: the user's side and the program's side.
fn terminal() -> (File, OwnedFd) {
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let name = ptsname(&user, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let program = rustix::fs::open(name, flags, Mode::empty()).unwrap();
    (user.into(), program)
}

/// Runs a guest of a few instructions on the terminal.
fn run(kernel: &Elf, dir: &Path, terminal: &OwnedFd) -> Child {
    let image = dir.join("kernel");
    fs::write(&image, kernel.bytes()).unwrap();
    let config = dir.join("config.json");
    fs::write(&config, json!({"boot-source": {"kernel_image_path": image}}).to_string()).unwrap();
    let side = || Stdio::from(terminal.try_clone().unwrap());
    let mut command = Command::new(vmm_path());
    command.args(["--no-api", "--boot-timer", "--config-file"]).arg(config);
    command.stdin(side()).stdout(side()).stderr(side()).process_group(0).spawn().unwrap()
}

/// Reads the program's output until it contains `text`.
fn wait_for(user: &mut File, text: &str) {
    let (mut output, mut chunk) = (String::new(), [0; 1000]);
    while !output.contains(text) {
        let len = user.read(&mut chunk).unwrap_or_else(|e| panic!("{e}, after {output}"));
        output += &String::from_utf8_lossy(&chunk[..len]);
    }
}

fn is_raw(settings: &Termios) -> bool {
    !settings.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

#[test]
fn the_terminal_is_raw_until_sigterm_restores_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut user, program) = terminal();
    let before = tcgetattr(&program).unwrap();
    assert!(!is_raw(&before));
    let mut child = run(&elf::null_guest(), dir.path(), &program);
    wait_for(&mut user, "Guest-boot-time");
    assert!(is_raw(&tcgetattr(&program).unwrap()));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    let after = tcgetattr(&program).unwrap();
    assert_eq!(after.local_modes, before.local_modes);
    assert_eq!(after.input_modes, before.input_modes);
}

#[test]
fn the_terminal_is_restored_when_the_guest_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (_user, program) = terminal();
    let before = tcgetattr(&program).unwrap();
    let mut child = run(&elf::reset_guest(), dir.path(), &program);
    assert!(child.wait().unwrap().success());
    assert_eq!(tcgetattr(&program).unwrap().local_modes, before.local_modes);
}

#[test]
fn terminal_input_reaches_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (mut user, program) = terminal();
    // Waits for a byte on the serial port and sends it back plus one.
    // mov dx, 0x3fd; again: in al, dx; test al, 1; jz again
    // mov dx, 0x3f8; in al, dx; inc eax; out dx, al; hlt; jmp $-1
    let echo = [
        0xc6, 0x05, 0x00, 0x00, 0x00, 0xc0, 123, // the boot timer
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0x40, 0xee, 0xf4,
        0xeb, 0xfd,
    ];
    let mut child = run(&Elf::of(&echo), dir.path(), &program);
    wait_for(&mut user, "Guest-boot-time");
    user.write_all(b"A").unwrap();
    wait_for(&mut user, "B");
    child.kill().unwrap();
    child.wait().unwrap();
}
