//! Edges between modules, and the cycles among them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

use super::module::Id;
use super::resolve::{Definition, resolve};
use super::tree::Tree;

/// Modules that depend on each other in a circle.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cycle {
    /// Each begins where the one before it ends, the first where the last ends.
    pub(super) edges: Vec<Edge>,
}

/// One dependency, with one reference that makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Edge {
    pub(super) from: String,
    pub(super) to: String,
    /// Where the reference is.
    pub(super) file: PathBuf,
    pub(super) line: usize,
    /// The path as it is written there.
    pub(super) path: String,
}

/// The edges among the nodes of one level. A node is a child of the level's module, or that module
/// for its own items.
type Level = BTreeMap<(Id, Id), Edge>;

/// Finds cycles such that each edge that is part of any is part of one of them.
pub(super) fn cycles(tree: &Tree) -> Vec<Cycle> {
    let mut cycles = Vec::new();
    for level in levels(tree).values() {
        let mut covered = BTreeSet::new();
        for &(from, to) in level.keys() {
            if covered.contains(&(from, to)) {
                continue;
            }
            let Some(back) = shortest(level, to, from) else { continue };
            let circle: Vec<(Id, Id)> = std::iter::once((from, to)).chain(back).collect();
            covered.extend(circle.iter().copied());
            cycles.push(Cycle { edges: circle.iter().map(|edge| level[edge].clone()).collect() });
        }
    }
    cycles
}

/// The edges of each level, by the level's module.
fn levels(tree: &Tree) -> BTreeMap<Id, Level> {
    let mut levels: BTreeMap<Id, Level> = BTreeMap::new();
    for (from, module) in tree.modules.iter().enumerate() {
        for reference in &module.references {
            let Some(Definition::ItemOf(to)) = resolve(tree, from, &reference.path) else { continue };
            if from == to {
                continue;
            }
            let (level, from, to) = nodes(tree, from, to);
            levels.entry(level).or_default().entry((from, to)).or_insert_with(|| Edge {
                from: name(tree, level, from),
                to: name(tree, level, to),
                file: module.file.clone(),
                line: reference.line,
                path: reference.path.join("::"),
            });
        }
    }
    levels
}

/// The common parent of two modules, and the node of each at its level.
fn nodes(tree: &Tree, from: Id, to: Id) -> (Id, Id, Id) {
    let above: Vec<Id> = tree.ancestors(from).collect();
    let level = tree.ancestors(to).find(|id| above.contains(id)).expect("the root is above both");
    let node = |id| tree.ancestors(id).take_while(|&id| id != level).last().unwrap_or(level);
    (level, node(from), node(to))
}

/// What a node is called: `a::b`, or `a (its own items)` for the level's module.
fn name(tree: &Tree, level: Id, node: Id) -> String {
    let path = &tree.modules[node].path;
    let path = if path.is_empty() { "crate" } else { path };
    if node == level { format!("{path} (its own items)") } else { path.to_owned() }
}

/// The edges of a shortest way between two nodes.
fn shortest(level: &Level, from: Id, to: Id) -> Option<Vec<(Id, Id)>> {
    let mut came: BTreeMap<Id, Id> = BTreeMap::new();
    let mut queue = VecDeque::from([from]);
    while let Some(node) = queue.pop_front() {
        if node == to {
            let mut way = Vec::new();
            let mut node = to;
            while node != from {
                let before = came[&node];
                way.push((before, node));
                node = before;
            }
            way.reverse();
            return Some(way);
        }
        for &(_, next) in level.range((node, 0)..=(node, Id::MAX)).map(|(edge, _)| edge) {
            if next != from && !came.contains_key(&next) {
                came.insert(next, node);
                queue.push_back(next);
            }
        }
    }
    None
}
