//! Whether this machine's own KVM runs ordinary guests.

/// What the local KVM can do.
pub(super) struct LocalKvm {
    /// Whether an unmodified kernel runs.
    pub(super) runs_guests: bool,
    /// A description of what it can do, with the reason.
    pub(super) in_words: String,
}

/// Probes the local KVM.
pub(super) fn local_kvm() -> LocalKvm {
    let report = machine::probe::probe();
    LocalKvm { runs_guests: report.runs_unmodified_guests(), in_words: report.to_string() }
}
