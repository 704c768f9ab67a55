//! A directory of kernel modules, with their dependencies and aliases.
//!
//! A machine that runs these tests may have no `kmod`, and no `depmod` index for a kernel that was
//! only unpacked. So names and dependencies are read from the modules: the `.modinfo` section of a
//! `.ko` is a list of NUL-terminated `key=value` strings.
//!
//! Names are normal names, with `_` for `-`: the kernel treats both as equal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A flat directory of uncompressed `.ko` files.
#[derive(Debug, Clone)]
pub struct Modules {
    dir: PathBuf,
}

impl Modules {
    /// The modules in `dir`, each as `NAME.ko` with `_` for `-` in its name.
    pub fn new(dir: impl Into<PathBuf>) -> Modules {
        Modules { dir: dir.into() }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of one module.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{}.ko", normal_name(name)))
    }

    /// `names` and their dependencies, each once and after its own dependencies.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        let mut path = Vec::new();
        for name in names {
            self.visit(&normal_name(name), &mut path, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, path: &mut Vec<String>, order: &mut Vec<String>) -> Result<()> {
        if order.iter().any(|done| done == name) {
            return Ok(());
        }
        if path.iter().any(|above| above == name) {
            bail!("kernel module {name} depends on itself: {}", path.join(" -> "));
        }
        let file = self.file(name);
        let image =
            std::fs::read(&file).with_context(|| format!("kernel module {name}: {}", file.display()))?;
        path.push(name.to_owned());
        for dependency in
            info(&image, "depends").flat_map(|list| list.split(',')).filter(|name| !name.is_empty())
        {
            self.visit(&normal_name(dependency), path, order)?;
        }
        path.pop();
        order.push(name.to_owned());
        Ok(())
    }

    /// The aliases by which the kernel requests modules (`fs-overlay`, `char-major-10-200`,
    /// `devname:net/tun`). Aliases that match hardware are left out.
    pub fn read_aliases(&self) -> Result<BTreeMap<String, String>> {
        let mut aliases = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir).with_context(|| self.dir.display().to_string())? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko")) else {
                continue;
            };
            let image = std::fs::read(&path).with_context(|| path.display().to_string())?;
            for alias in info(&image, "alias") {
                if alias.starts_with("devname:") {
                    aliases.insert(alias.to_owned(), name.to_owned());
                } else if !alias.contains(':') {
                    aliases.insert(normal_name(alias), name.to_owned());
                }
            }
        }
        Ok(aliases)
    }
}

/// The name as the kernel compares it.
pub fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

/// The values of `key` in a module's `.modinfo`.
fn info<'a>(image: &'a [u8], key: &'a str) -> impl Iterator<Item = &'a str> {
    modinfo(image)
        .unwrap_or_default()
        .split(|&byte| byte == 0)
        .filter_map(move |entry| std::str::from_utf8(entry).ok()?.strip_prefix(key)?.strip_prefix('='))
}

/// The `.modinfo` section of a 64-bit little-endian ELF file; `None` for any other file.
fn modinfo(image: &[u8]) -> Option<&[u8]> {
    if image.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(number(image, 0x28, 8)?).ok()?;
    let entry_size = usize::try_from(number(image, 0x3a, 2)?).ok()?;
    let count = usize::try_from(number(image, 0x3c, 2)?).ok()?;
    let names = usize::try_from(number(image, 0x3e, 2)?).ok()?;
    let section = |index: usize| {
        let header = table.checked_add(index.checked_mul(entry_size)?)?;
        let offset = usize::try_from(number(image, header.checked_add(0x18)?, 8)?).ok()?;
        let size = usize::try_from(number(image, header.checked_add(0x20)?, 8)?).ok()?;
        let name = usize::try_from(number(image, header, 4)?).ok()?;
        Some((name, image.get(offset..offset.checked_add(size)?)?))
    };
    let (_, strings) = section(names)?;
    (0..count)
        .filter_map(section)
        .find(|(name, _)| strings.get(*name..).is_some_and(|rest| rest.starts_with(b".modinfo\0")))
        .map(|(_, content)| content)
}

fn number(image: &[u8], offset: usize, size: usize) -> Option<u64> {
    let bytes = image.get(offset..offset.checked_add(size)?)?;
    Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with only a `.modinfo` section.
    fn module(info: &str) -> Vec<u8> {
        let strings = b"\0.modinfo\0.shstrtab\0";
        let (info_at, strings_at) = (0x40, 0x40 + info.len());
        let table_at = strings_at + strings.len();
        let mut file = vec![0; 0x40];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[0x28..0x30].copy_from_slice(&(table_at as u64).to_le_bytes());
        file[0x3a..0x3c].copy_from_slice(&64_u16.to_le_bytes());
        file[0x3c..0x3e].copy_from_slice(&3_u16.to_le_bytes());
        file[0x3e..0x40].copy_from_slice(&2_u16.to_le_bytes());
        file.extend_from_slice(info.as_bytes());
        file.extend_from_slice(strings);
        for (name, offset, size) in [(0_u32, 0, 0), (1, info_at, info.len()), (10, strings_at, strings.len())]
        {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file
    }

    fn directory(modules: &[(&str, &str)]) -> (tempfile::TempDir, Modules) {
        let dir = tempfile::tempdir().unwrap();
        for (name, info) in modules {
            std::fs::write(dir.path().join(format!("{name}.ko")), module(info)).unwrap();
        }
        let modules = Modules::new(dir.path());
        (dir, modules)
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let (_dir, modules) = directory(&[
            ("kvm_amd", "license=GPL\0depends=kvm,ccp\0"),
            ("kvm", "depends=irq-bypass\0"),
            ("irq_bypass", "depends=\0"),
            ("ccp", "depends=\0"),
        ]);
        assert_eq!(modules.load_order(&["kvm-amd", "kvm"]).unwrap(), ["irq_bypass", "kvm", "ccp", "kvm_amd"]);
    }

    #[test]
    fn a_circle_of_modules_is_an_error() {
        let (_dir, modules) = directory(&[("a", "depends=b\0"), ("b", "depends=a\0")]);
        assert!(modules.load_order(&["a"]).unwrap_err().to_string().contains("a -> b"));
    }

    #[test]
    fn a_missing_module_is_named() {
        let (_dir, modules) = directory(&[("a", "depends=b\0")]);
        assert!(format!("{:#}", modules.load_order(&["a"]).unwrap_err()).contains("kernel module b"));
    }

    #[test]
    fn aliases_of_hardware_are_left_out() {
        let (_dir, modules) =
            directory(&[("tun", "alias=devname:net/tun\0alias=char-major-10-200\0alias=pci:v1\0")]);
        let aliases: Vec<_> = modules.read_aliases().unwrap().into_keys().collect();
        assert_eq!(aliases, ["char_major_10_200", "devname:net/tun"]);
    }

    #[test]
    fn a_file_that_is_no_module_has_no_information() {
        assert!(modinfo(b"MZ").is_none());
        let mut broken = module("depends=a\0");
        broken[0x28..0x30].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(modinfo(&broken).is_none());
    }
}
