//! How many tests passed, failed and so on.

use super::record::Verdict;

/// The results of some tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) passed: usize,
    pub(super) failed: usize,
    pub(super) ignored: usize,
    pub(super) filtered_out: usize,
    /// Lines for the summary: the names of failed and ignored tests, with the reason.
    pub(super) notes: Vec<String>,
}

impl Tally {
    pub(super) fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.filtered_out += other.filtered_out;
        self.notes.extend(other.notes);
    }

    /// One failed test.
    pub(super) fn failure(note: String) -> Tally {
        Tally { failed: 1, notes: vec![note], ..Tally::default() }
    }

    /// Counts one test.
    pub(super) fn count(&mut self, title: &str, verdict: &Verdict) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Failed(reason) => {
                self.failed += 1;
                self.notes.push(format!("failed: {title}: {reason}"));
            }
            Verdict::Ignored(reason) => {
                self.ignored += 1;
                self.notes.push(format!("ignored: {title}: {reason}"));
            }
        }
    }
}
