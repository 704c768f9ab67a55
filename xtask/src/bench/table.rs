//! Samples, their medians, and a table of them in Markdown.

/// One row: a monitor.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: String,
    /// The values of all runs, for each column. Empty where the monitor has no such figure.
    pub(super) samples: Vec<Vec<f64>>,
}

impl Row {
    /// Adds values to each column.
    pub(super) fn add(&mut self, values: Vec<Vec<f64>>) {
        self.samples.resize(values.len().max(self.samples.len()), Vec::new());
        for (samples, values) in self.samples.iter_mut().zip(values) {
            samples.extend(values);
        }
    }
}

/// The value in the middle; the lower one of two.
pub(super) fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

/// The table: medians, with the least and the most in brackets.
pub(super) fn markdown(columns: &[&str], rows: &[Row]) -> String {
    let head = format!("| | {} |\n|---|{}\n", columns.join(" | "), "---:|".repeat(columns.len()));
    let lines = rows.iter().map(|row| {
        let cells: Vec<String> = row.samples.iter().map(|samples| cell(samples)).collect();
        format!("| {} | {} |\n", row.name, cells.join(" | "))
    });
    head + &lines.collect::<String>()
}

fn cell(samples: &[f64]) -> String {
    let Some(middle) = median(samples) else { return "-".to_owned() };
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // Values over a thousand are not precise to a tenth.
    let digits = usize::from(middle < 1000.0);
    format!("{middle:.digits$} ({least:.digits$}..{most:.digits$})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_value_that_was_measured() {
        assert_eq!(median(&[5.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_missing_figure_is_a_dash() {
        let rows = [Row { name: "qemu".to_owned(), samples: vec![vec![], vec![1.25, 2.0, 9.0]] }];
        assert_eq!(
            markdown(&["a", "b"], &rows),
            "| | a | b |\n|---|---:|---:|\n| qemu | - | 2.0 (1.2..9.0) |\n"
        );
    }
}
