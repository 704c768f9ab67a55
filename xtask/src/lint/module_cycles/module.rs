//! One module of a crate.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// The place of a module in the list of all modules of its crate.
pub(super) type Id = usize;

/// One module.
#[derive(Default)]
pub(super) struct Module {
    /// Its path without `crate::`; empty for the root.
    pub(super) path: String,
    /// `None` for the root.
    pub(super) parent: Option<Id>,
    pub(super) children: BTreeMap<String, Id>,
    /// Its file, relative to the repository.
    pub(super) file: PathBuf,
    /// The names of the items that it defines itself.
    pub(super) items: BTreeSet<String>,
    /// What its `use` declarations name, by the name that they give it.
    pub(super) imports: BTreeMap<String, Vec<String>>,
    /// What is before the `*` of its `use` declarations.
    pub(super) globs: Vec<Vec<String>>,
    /// The paths in its code.
    pub(super) references: Vec<Reference>,
}

/// A path in code.
pub(super) struct Reference {
    pub(super) path: Vec<String>,
    pub(super) line: usize,
}
