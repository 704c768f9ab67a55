//! What a path means: the module that defines the item that it names.

use super::module::Id;
use super::tree::{ROOT, Tree};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Definition {
    Module(Id),
    /// An item that this module defines.
    ItemOf(Id),
}

/// The most aliases followed for one name. Aliases may stand in a circle.
const DEPTH: usize = 32;

/// Resolves a path in the code of a module; `None` for what other crates define.
pub(super) fn resolve(tree: &Tree, from: Id, path: &[String]) -> Option<Definition> {
    follow(tree, from, path, DEPTH)
}

fn follow(tree: &Tree, from: Id, path: &[String], depth: usize) -> Option<Definition> {
    let depth = depth.checked_sub(1)?;
    let (first, rest) = path.split_first()?;
    let mut found = match first.as_str() {
        "crate" => Definition::Module(ROOT),
        "self" => Definition::Module(from),
        "super" => Definition::Module(tree.modules[from].parent?),
        name => lookup(tree, from, name, !rest.is_empty(), depth)?,
    };
    for (index, name) in rest.iter().enumerate() {
        // What follows an item's name is in the item: a variant, an associated function.
        let Definition::Module(module) = found else { break };
        found = if name == "super" {
            Definition::Module(tree.modules[module].parent?)
        } else {
            let last = index + 1 == rest.len();
            // A macro may have defined it.
            lookup(tree, module, name, !last, depth).unwrap_or(Definition::ItemOf(module))
        };
    }
    Some(found)
}

/// Looks a name up in a module. A module and an item may share it: `module` says which is meant.
fn lookup(tree: &Tree, id: Id, name: &str, module: bool, depth: usize) -> Option<Definition> {
    let scope = &tree.modules[id];
    let child = scope.children.get(name).map(|&child| Definition::Module(child));
    let item = scope.items.contains(name).then_some(Definition::ItemOf(id));
    let import = || {
        let path = scope.imports.get(name)?;
        follow(tree, id, path, depth)
    };
    let glob = || {
        scope.globs.iter().find_map(|path| match follow(tree, id, path, depth)? {
            Definition::Module(other) if other != id => {
                lookup(tree, other, name, module, depth.checked_sub(1)?)
            }
            _ => None,
        })
    };
    if module {
        child.or(item).or_else(import).or_else(glob)
    } else {
        item.or_else(import).or(child).or_else(glob)
    }
}
