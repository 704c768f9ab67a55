//! `cargo xtask`: tests, benchmarks and other tasks of development.

#![deny(unsafe_code)]

mod apt;
mod bench;
mod clients;
mod demo;
mod guest_kernel;
mod host;
mod kernels;
mod link_order;
mod lint;
mod openapi;
mod peers;
mod pip;
mod process;
mod python_disk;
mod soak;
mod test;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;

const USAGE: &str = "\
cargo xtask COMMAND

  demo
        Boots a microVM whose guest says hello, and shows its timeline.
  test [--lint] [--unit] [--system] [FILTER]
        Runs lints, unit tests and whole-system tests: all, or those layers and those tests whose
        name contains FILTER.
  lint [NAME] [PATH...]
        Checks sources without compiling them: all lints, or one of columns, test_names, file_size,
        module_cycles; the whole repository, or the files below each PATH.
  openapi [--check]
        Writes docs/api/openapi.yaml and openapi.json, the description of the API, or checks that
        they are current.
  soak [N] [--seed S]
        Runs randomized tests N times as often (10): fuzz targets with inputs from seeds, models,
        killed and damaged snapshots.

  host [--cpus N] [--mem MIB] [--timeout S] [--pin CPU|none] [--modules A,B] [--kernel-log FILE] [--] CMD...
        Runs CMD where KVM runs ordinary guests: on this machine if it can, else on the emulated host.
  bench api [--runs N] [PEERS]
        Measures requests of the API, and configuring a microVM by it.
  bench boot [--runs N] [PEERS]
        Measures boot time and resident memory.
  bench io [--runs N] [--seconds S] [--disk FILE] [--pci] [--workload W]... [--only NAME]... [PEERS]
        Measures disks in a guest, beside the same disks without a guest; overwrites FILE.
  bench snapshot [--runs N] [PEERS]
        Measures snapshots, restores, clones and forks.
  bench vsock [--runs N] [--pci] [PEERS]
        Measures round trips and throughput between host and guest.
  bench net [--runs N] [--seconds S] [--pci] [--only NAME]... [PEERS]
        Measures networks of a guest, beside the host's loopback.

        PEERS are monitors to compare with. Default: Firecracker if `cargo xtask peers` has fetched
        it; boot, io and net also measure QEMU's microvm if it is installed. --no-peers: without
        Firecracker. --peer NAME=PATH: with that monitor, perhaps an older build of vesta.
        --peer firecracker: fetches Firecracker first.
  peers
        Fetches Firecracker's release binary for benchmarks, and prints its path.
  kernel
        Builds the tuned guest kernel from Debian's sources (about ten minutes).
  link-order [--check]
        Writes crates/vmm/link-order.txt, the order of functions in the release binary, or checks
        that the binary still has those functions.

Environment:
  VESTA_HOST=native|emulated   the host to use, whatever the local KVM can do
  VESTA_HOST_PIN=CPU|none      the emulated processor that commands run on (1)
  VESTA_TUNED_KERNEL=FILE      the tuned guest kernel, a vmlinux or a .zst of one
";

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    let result =
        if host::init::is_modprobe(&name) { host::init::modprobe(args) } else { dispatch(args.collect()) };
    match result {
        Ok(status) => status,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: Vec<OsString>) -> Result<ExitCode> {
    let mut parser = lexopt::Parser::from_args(args);
    let command = match parser.next()? {
        None | Some(Long("help") | Short('h')) => {
            print!("{USAGE}");
            return Ok(ExitCode::SUCCESS);
        }
        Some(Value(command)) => command,
        Some(arg) => return Err(arg.unexpected().into()),
    };
    let command = command.to_str().context("the command is not UTF-8")?;
    if command == "host-init" {
        return host::init::main(&mut parser);
    }
    process::clean_up_on_signals()?;
    match command {
        "bench" => bench::command(&mut parser),
        "bench-api-inner" => bench::api_inner(&mut parser),
        "bench-inner" => bench::inner(&mut parser),
        "bench-io-inner" => bench::io_inner(&mut parser),
        "bench-snapshot-inner" => bench::snapshot_inner(&mut parser),
        "bench-vsock-inner" => bench::vsock_inner(&mut parser),
        "bench-net-inner" => bench::net_inner(&mut parser),
        "peers" => peers::command(&mut parser),
        "lint" => lint::command(&mut parser),
        "openapi" => openapi::command(&mut parser),
        "soak" => soak::command(&mut parser),
        "link-order" => link_order::command(&mut parser),
        "kernel" => guest_kernel::command(&mut parser),
        "demo" => demo::command(&mut parser),
        "demo-inner" => demo::inner(&mut parser),
        "host" => host::command(&mut parser),
        "test" => test::command(&mut parser),
        "test-inner" => test::inner::main(&mut parser),
        _ => bail!("command {command}: unknown\n\n{USAGE}"),
    }
}
