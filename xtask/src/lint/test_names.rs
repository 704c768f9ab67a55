//! `lint::test_names`: the name of a test function has at most [`BOUND`] characters.
//!
//! Tests are found in the tokens of a file, so that those inside macros (`proptest!`) count too.

use anyhow::{Result, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::finding::Finding;
use super::sources::Sources;

/// The most characters that the name of a test may have.
const BOUND: usize = 60;

/// Macros whose every function becomes tests: `on_each_transport!`, `on_each_kernel!`.
const TEST_MACROS: &str = "on_each_";

/// Checks all Rust files.
pub(super) fn check(sources: &Sources) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for source in sources.rust() {
        let (file, text) = source?;
        for test in tests_of(&text).map_err(|error| anyhow!("{}: {error}", file.display()))? {
            let characters = test.name.chars().count();
            if characters > BOUND {
                let what = format!("test name {} has {characters} characters; at most {BOUND}", test.name);
                findings.push(Finding::new(file, test.line, what));
            }
        }
    }
    Ok(findings)
}

/// A test function.
#[derive(Debug, PartialEq, Eq)]
struct Test {
    name: String,
    line: usize,
}

fn tests_of(text: &str) -> Result<Vec<Test>, proc_macro2::LexError> {
    let mut tests = Vec::new();
    collect(text.parse()?, false, &mut tests);
    Ok(tests)
}

/// Finds the tests among some tokens; `all` where every function is one.
fn collect(tokens: TokenStream, all: bool, tests: &mut Vec<Test>) {
    // Whether the attributes before the next item say that it is a test.
    let mut marked = false;
    // The name of the macro whose tokens come next.
    let mut invoked: Option<String> = None;
    let mut tokens = tokens.into_iter().peekable();
    let mut previous: Option<String> = None;
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Group(group)
                if group.delimiter() == Delimiter::Bracket && group.stream().to_string() == "test" =>
            {
                marked = true;
            }
            TokenTree::Group(group) => {
                let of_tests = invoked.take().is_some_and(|name| name.starts_with(TEST_MACROS));
                let block = group.delimiter() == Delimiter::Brace;
                collect(group.stream(), of_tests, tests);
                marked &= !block;
            }
            TokenTree::Ident(word) if word == "fn" => {
                if let Some(TokenTree::Ident(name)) = tokens.peek()
                    && (all || marked)
                {
                    tests.push(Test { name: name.to_string(), line: name.span().start().line });
                }
                marked = false;
            }
            TokenTree::Ident(word) => previous = Some(word.to_string()),
            TokenTree::Punct(punct) if punct.as_char() == '!' => invoked = previous.take(),
            TokenTree::Punct(punct) => marked &= punct.as_char() != ';',
            TokenTree::Literal(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        tests_of(text).unwrap().into_iter().map(|test| test.name).collect()
    }

    #[test]
    fn functions_with_the_attribute_are_tests() {
        assert_eq!(names("fn a() {} #[test] #[ignore] fn b() { fn c() {} } fn d() {}"), ["b"]);
        assert_eq!(names("#[cfg(test)] mod tests { /// Doc.\n #[test] fn a() -> [u8; 1] {} }"), ["a"]);
    }

    #[test]
    fn functions_in_macros_of_tests_are_tests() {
        assert_eq!(names("proptest! { #[test] fn a(x in 0..1) {} fn b() {} }"), ["a"]);
        assert_eq!(names("on_each_kernel! { /// Doc.\n fn a(k) { fn c() {} } fn b(k) {} }"), ["a", "b"]);
        assert_eq!(names("macro_rules! on_each { () => { #[test] fn $name() {} } }"), [""; 0]);
    }

    #[test]
    fn a_test_is_on_the_line_of_its_name() {
        let test = Test { name: "a".to_owned(), line: 3 };
        assert_eq!(tests_of("\n#[test]\nfn a() {}\n").unwrap(), [test]);
    }
}
