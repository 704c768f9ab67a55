//! CPU templates in files: where the section `cpu-config` of a configuration file is a path, and
//! for the [tools](crate::cpu_template_tool).

use std::fs;
use std::io;
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

/// Reads and checks a template.
pub(crate) fn read(path: &Path) -> Result<CpuConfig, TemplateFileError> {
    let path = || path.to_owned();
    let text = fs::read(path()).map_err(|source| TemplateFileError::Read { path: path(), source })?;
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
