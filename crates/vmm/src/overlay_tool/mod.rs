//! The tools for overlay files: `vesta-vmm overlay ...`. They start no microVM.
//!
//! - [`args`]: the command line.
//! - [`info`]: an overlay file as text and JSON.
//! - [`export`]: a disk with its overlays as one image, raw or [`qcow2`].
//!
//! Results go to standard output. Errors go to standard error, with exit status 1. Only `export`
//! writes a file: a new one, which appears when it is complete.

pub(crate) mod args;
mod command;
mod error;
mod export;
mod info;
mod qcow2;

use std::fmt;
use std::io::Write as _;
use std::path::Path;

use block::disk::DiskImage;
use block::overlay::inspect::{OverlayFile, SessionState};

use crate::exit::ExitCode;
use crate::tool_end::end_of;
use command::BackingFiles;
pub(crate) use command::Tool;
use error::ToolError;
use info::Info;

/// Runs a command. Errors are on standard error.
pub(crate) fn run(tool: &Tool) -> ExitCode {
    end_of(perform(tool), ToolError::output)
}

fn perform(tool: &Tool) -> Result<(), ToolError> {
    match tool {
        Tool::Help => print(args::HELP),
        Tool::Info { file, json } => {
            let overlay = OverlayFile::open(file)?;
            let info = Info(overlay.info());
            if *json { print(format_args!("{:#}\n", info.json())) } else { print(info) }
        }
        Tool::Check { file, backing } => {
            let overlay = OverlayFile::open(file)?;
            let shown = file.display();
            print(format_args!("{shown}: header, session and maps are valid\n"))?;
            let state = overlay.info().state;
            print(format_args!("{shown}: {}\n", info::state_text(state)))?;
            if state == SessionState::Unknown {
                return Err(ToolError::Unknown { path: file.clone() });
            }
            let Some(backing) = backing else { return Ok(()) };
            let image = open(backing, file)?;
            let base = backing.base.display();
            print(format_args!("{shown}: it fits {base}; the disk has {} bytes\n", image.size()))
        }
        Tool::Export { file, backing, output, format } => {
            let image = open(backing, file)?;
            let exported = export::export(&image, output, *format)?;
            let (shown, size) = (output.display(), image.size());
            print(format_args!("{shown}: {format}, a disk of {size} bytes, {exported} bytes of data\n"))
        }
    }
}

/// Opens the disk whose topmost overlay is `top`.
fn open(backing: &BackingFiles, top: &Path) -> Result<DiskImage, ToolError> {
    let overlays: Vec<_> = backing.layers.iter().cloned().chain([top.to_owned()]).collect();
    Ok(DiskImage::open(&backing.base, &overlays)?)
}

fn print(text: impl fmt::Display) -> Result<(), ToolError> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}")?;
    out.flush()?;
    Ok(())
}
