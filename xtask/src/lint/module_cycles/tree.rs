//! The modules of a crate, as they stand in its files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::{Attribute, Expr, Item, ItemMod, Lit, Meta};

use super::super::test_cfg::any_test_only;
use super::collect::collect;
use super::module::{Id, Module};

/// The root module of a crate.
pub(super) const ROOT: Id = 0;

/// All modules of a crate, without those that only test builds have.
pub(super) struct Tree {
    pub(super) modules: Vec<Module>,
}

impl Tree {
    /// Reads a crate from its root file, which is relative to `repository`.
    pub(super) fn read(repository: &Path, root: &Path) -> Result<Tree> {
        Tree::read_with(root, &|file: &Path| {
            std::fs::read_to_string(repository.join(file)).with_context(|| file.display().to_string())
        })
    }

    /// Reads a crate with a reader of files.
    pub(super) fn read_with(root: &Path, read: &dyn Fn(&Path) -> Result<String>) -> Result<Tree> {
        let mut tree = Tree { modules: Vec::new() };
        let directory = root.parent().unwrap_or(Path::new(""));
        tree.modules.push(Module { file: root.to_owned(), ..Module::default() });
        tree.add_file(ROOT, directory, read)?;
        Ok(tree)
    }

    /// Parses the file of a module, whose child modules are in `directory`.
    fn add_file(&mut self, id: Id, directory: &Path, read: &dyn Fn(&Path) -> Result<String>) -> Result<()> {
        let file = self.modules[id].file.clone();
        let parsed = syn::parse_file(&read(&file)?).with_context(|| file.display().to_string())?;
        if any_test_only(&parsed.attrs) {
            return Ok(());
        }
        self.add_items(id, parsed.items, directory, read)
    }

    fn add_items(
        &mut self,
        id: Id,
        items: Vec<Item>,
        directory: &Path,
        read: &dyn Fn(&Path) -> Result<String>,
    ) -> Result<()> {
        for item in items {
            match item {
                Item::Mod(module) if any_test_only(&module.attrs) => {}
                Item::Mod(module) => self.add_module(id, module, directory, read)?,
                item => collect(&mut self.modules[id], &item),
            }
        }
        Ok(())
    }

    fn add_module(
        &mut self,
        parent: Id,
        item: ItemMod,
        directory: &Path,
        read: &dyn Fn(&Path) -> Result<String>,
    ) -> Result<()> {
        let name = item.ident.to_string();
        let directory = directory.join(&name);
        let inline = item.content.is_some();
        let file = if inline {
            self.modules[parent].file.clone()
        } else if let Some(named) = path_attribute(&item.attrs) {
            self.modules[parent].file.with_file_name(named)
        } else {
            let beside = directory.with_extension("rs");
            if read(&beside).is_ok() { beside } else { directory.join("mod.rs") }
        };
        let id = self.child(parent, &name, file);
        match item.content {
            Some((_, items)) => self.add_items(id, items, &directory, read),
            None => self.add_file(id, &directory, read),
        }
    }

    /// The child module of this name; two with different `cfg` are one.
    fn child(&mut self, parent: Id, name: &str, file: PathBuf) -> Id {
        if let Some(&id) = self.modules[parent].children.get(name) {
            return id;
        }
        let id = self.modules.len();
        let above = &mut self.modules[parent];
        above.children.insert(name.to_owned(), id);
        let path = if above.path.is_empty() { name.to_owned() } else { format!("{}::{name}", above.path) };
        self.modules.push(Module { path, parent: Some(parent), file, ..Module::default() });
        id
    }

    /// The modules that a module is in: itself, its parent and so on up to the root.
    pub(super) fn ancestors(&self, id: Id) -> impl Iterator<Item = Id> {
        std::iter::successors(Some(id), |&id| self.modules[id].parent)
    }
}

/// The file in `#[path = "file"]`.
fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| {
        let Meta::NameValue(pair) = &attribute.meta else { return None };
        let Expr::Lit(value) = &pair.value else { return None };
        let Lit::Str(value) = &value.lit else { return None };
        pair.path.is_ident("path").then(|| value.value())
    })
}
