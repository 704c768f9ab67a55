//! Cycles in crates of a few lines.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;

use super::*;

/// The cycles of a crate, each as `a -> b -> a`, with the lines of its references.
fn cycles(files: &[(&str, &str)]) -> Vec<(String, Vec<String>)> {
    let files: BTreeMap<&Path, &str> = files.iter().map(|&(name, text)| (Path::new(name), text)).collect();
    let read = |file: &Path| files.get(file).map(ToString::to_string).context("no such file");
    let tree = Tree::read_with(Path::new("lib.rs"), &read).unwrap();
    let findings = graph::cycles(&tree).into_iter().map(|cycle| finding("x", &cycle));
    findings
        .map(|finding| {
            let circle = finding.what.strip_prefix("x: module cycle ").unwrap();
            (
                circle.strip_suffix("; move what they share into a leaf module").unwrap().to_owned(),
                finding.details,
            )
        })
        .collect()
}

/// The same for a crate of one file.
fn circles(text: &str) -> Vec<String> {
    cycles(&[("lib.rs", text)]).into_iter().map(|(circle, _)| circle).collect()
}

#[test]
fn siblings_that_use_each_other_are_a_cycle() {
    let found = cycles(&[
        ("lib.rs", "mod a;\nmod b;"),
        ("a.rs", "use crate::b::B;\npub struct A;"),
        ("b/mod.rs", "mod inner;\npub struct B;"),
        ("b/inner.rs", "\nfn f(_: &super::super::a::A) {}"),
    ]);
    let edges = ["a -> b: a.rs:1: crate::b::B", "b -> a: b/inner.rs:2: super::super::a::A"];
    assert_eq!(found, [("a -> b -> a".to_owned(), edges.map(str::to_owned).to_vec())]);
}

#[test]
fn one_direction_is_no_cycle() {
    assert_eq!(circles("mod a { use crate::b::B; } mod b { pub struct B; fn f() -> B { B } }"), [""; 0]);
}

#[test]
fn a_cycle_of_three_is_reported_once() {
    let text = "mod a { use crate::b::X; pub struct X; }
        mod b { pub struct X; fn f() { crate::c::X; } }
        mod c { use super::a; pub struct X; fn f(_: a::X) {} }";
    assert_eq!(circles(text), ["a -> b -> c -> a"]);
}

#[test]
fn a_child_and_the_items_of_its_parent_are_a_cycle() {
    let text = "mod a { mod b { use super::A; pub struct B(A); } use b::B; pub struct A; }";
    assert_eq!(circles(text), ["a (its own items) -> a::b -> a (its own items)"]);
    let text = "mod a { use crate::A; pub struct B; } fn f(_: a::B) {} struct A;";
    assert_eq!(circles(text), ["crate (its own items) -> a -> crate (its own items)"]);
    // The parent does not use the child.
    assert_eq!(circles("mod a { mod b { impl super::A {} } pub struct A; }"), [""; 0]);
}

#[test]
fn a_reexport_stands_for_its_definition() {
    // `b` uses what `a::x` defines through the root, which only passes it on.
    let text = "mod a { mod x { pub struct X; } pub use x::X; use crate::b::B; }
        mod b { use crate::Y; pub struct B(Y); }
        pub use a::X as Y;";
    assert_eq!(circles(text), ["a -> b -> a"]);
    // The child reaches a sibling through the parent, not the parent.
    let text = "mod a { mod x { pub struct X; } mod y { use super::X; } pub use x::X; fn f(_: X) {} }";
    assert_eq!(circles(text), [""; 0]);
}

#[test]
fn a_glob_import_counts_for_the_names_used() {
    let text =
        "mod a { use super::b::*; fn f(_: B) {} pub struct A; } mod b { use super::a::*; pub struct B; }";
    assert_eq!(circles(text), [""; 0]);
    let text = "mod a { use super::b::*; fn f(_: B) {} pub struct A; }
        mod b { use super::a::*; pub struct B; fn f(_: A) {} }";
    assert_eq!(circles(text), ["a -> b -> a"]);
}

#[test]
fn macro_calls_and_attributes_have_references() {
    let text = "mod a { fn f() { assert!(x.b(crate::b::B)); } pub mod hex {} }
        mod b { pub struct B { #[serde(with = \"crate::a::hex\")] x: u8 } #[serde(default = \"crate::a::f\")] struct C; }";
    assert_eq!(circles(text), ["a -> b -> a"]);
}

#[test]
fn a_macro_is_an_item_of_its_module() {
    let text = "mod a { macro_rules! say { () => { crate::b::f() } } pub(crate) use say; }
        mod b { use crate::a::say; pub fn f() { say!(); } }";
    assert_eq!(circles(text), ["a -> b -> a"]);
}

#[test]
fn test_code_and_visibility_are_no_references() {
    let text = "mod a { use crate::b::B; pub struct A; }
        mod b {
            pub(in crate::a) struct B;
            #[cfg(test)] use crate::a::A;
            #[cfg(test)] mod tests { use crate::a::A; }
            impl B { #[cfg(any(test, feature = \"testing\"))] fn f(_: crate::a::A) {} }
        }";
    assert_eq!(circles(text), [""; 0]);
}

#[test]
fn a_module_and_an_item_may_share_a_name() {
    let text = "mod run { pub fn run() {} } use run::run; fn f() { run(); run::run(); }";
    assert_eq!(circles(text), [""; 0]);
}

#[test]
fn names_of_other_crates_are_not_resolved() {
    assert_eq!(circles("mod a { use b::B; use ::c::C; } mod c { use crate::a::f; pub struct C; }"), [""; 0]);
}
