//! [`MetricsError`].

use std::path::PathBuf;

/// Why metrics cannot be configured, or a line was not written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The output is set already.
    #[error("metrics: the output is {} already; it can be set once", path.display())]
    AlreadySet {
        /// The output.
        path: PathBuf,
    },
    /// The output cannot be opened.
    #[error("metrics: cannot open the output {}: {source}", path.display())]
    Open {
        /// The output.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The line that a command asked for is lost. The next one has its counters.
    #[error("metrics: the line was not written to {}: {reason}", path.display())]
    Lost {
        /// The output.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}
