//! Which attributes leave an item out of a normal build.

use proc_macro2::TokenStream;
use syn::punctuated::Punctuated;
use syn::{Attribute, Expr, Lit, Meta, Token};

/// The feature with which a crate lends its test code to the tests of others.
const TEST_FEATURE: &str = "testing";

/// Whether one of these attributes leaves the item out of a build that is not for tests.
pub(super) fn any_test_only(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| is_test_only(&attribute.meta))
}

/// The same for what stands between the brackets of one attribute.
pub(super) fn is_test_only_tokens(attribute: TokenStream) -> bool {
    syn::parse2(attribute).is_ok_and(|meta| is_test_only(&meta))
}

fn is_test_only(meta: &Meta) -> bool {
    let Meta::List(list) = meta else { return false };
    list.path.is_ident("cfg") && list.parse_args().is_ok_and(|condition| needs_test(&condition))
}

/// Whether a condition holds in test builds only.
fn needs_test(condition: &Meta) -> bool {
    match condition {
        Meta::Path(path) => path.is_ident("test"),
        Meta::NameValue(pair) => {
            let Expr::Lit(value) = &pair.value else { return false };
            let Lit::Str(value) = &value.lit else { return false };
            pair.path.is_ident("feature") && value.value() == TEST_FEATURE
        }
        Meta::List(list) => {
            let conditions = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated);
            let Ok(conditions) = conditions else { return false };
            match list.path.get_ident().map(ToString::to_string).as_deref() {
                Some("all") => conditions.iter().any(needs_test),
                Some("any") => !conditions.is_empty() && conditions.iter().all(needs_test),
                _ => false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_that_need_a_test_build() {
        let test_only = |text: &str| is_test_only_tokens(text.parse().unwrap());
        for text in ["cfg(test)", "cfg(all(test, loom))", "cfg(any(test, feature = \"testing\"))"] {
            assert!(test_only(text), "{text}");
        }
        for text in ["test", "cfg(not(test))", "cfg(any(test, unix))", "cfg(unix)", "doc = \"cfg(test)\""] {
            assert!(!test_only(text), "{text}");
        }
    }
}
