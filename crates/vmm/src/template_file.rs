//! CPU templates in files: where the section `cpu-config` of a configuration file is a path, and
//! for the [tools](crate::cpu_template_tool).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use config::{ConfigError, CpuConfig, CpuConfigSource, VmConfig};

/// Why a template cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateFileError {
    #[error("cannot read the CPU template {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("invalid CPU template {}: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("invalid CPU template {}: {source}", path.display())]
    Bounds { path: PathBuf, source: ConfigError },
}

/// Longest file with a template, in bytes: many times what [`config::MAX_TEMPLATE_ENTRIES`] need.
const MAX_FILE: u64 = 16 << 20;

/// Reads a file or pipe of at most [`MAX_FILE`] bytes.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    if File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut text)? as u64 > MAX_FILE {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {MAX_FILE} bytes"),
        ));
    }
    Ok(text)
}

/// Reads and checks a template.
pub(crate) fn read(path: &Path) -> Result<CpuConfig, TemplateFileError> {
    let path = || path.to_owned();
    let text = read_bounded(&path()).map_err(|source| TemplateFileError::Read { path: path(), source })?;
    let template: CpuConfig =
        serde_json::from_slice(&text).map_err(|source| TemplateFileError::Json { path: path(), source })?;
    template.check().map_err(|source| TemplateFileError::Bounds { path: path(), source })?;
    Ok(template)
}

/// Reads the template of a configuration file, where it is in a file of its own.
pub(crate) fn resolve(config: &mut VmConfig) -> Result<(), TemplateFileError> {
    if let Some(CpuConfigSource::File(path)) = &config.cpu_config {
        config.cpu_config = Some(CpuConfigSource::Inline(read(path)?));
    }
    Ok(())
}
