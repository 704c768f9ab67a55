//! [`OPENAPI`]: the answer to `GET /openapi.json`.

/// The description of the API in OpenAPI 3.1, as JSON. `cargo xtask openapi` writes it. It is
/// neither parsed nor touched until a client asks for it.
pub(crate) const OPENAPI: &str = include_str!("../../../docs/api/openapi.json");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;
    use crate::api::ENDPOINTS;

    #[test]
    fn description_lists_the_endpoints_of_the_table() {
        let described: Value = serde_json::from_str(OPENAPI).unwrap();
        let described = described["paths"].as_object().unwrap().iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().keys();
            methods
                .filter(|method| *method != "parameters")
                .map(move |method| (method.to_uppercase(), path.clone()))
        });
        let served = ENDPOINTS.iter().map(|e| (e.method.name().to_owned(), e.path.to_owned()));
        let (described, served): (BTreeSet<_>, BTreeSet<_>) = (described.collect(), served.collect());
        let missing: Vec<_> = served.difference(&described).collect();
        let unknown: Vec<_> = described.difference(&served).collect();
        assert!(missing.is_empty(), "not in xtask/openapi/src/operations.rs: {missing:?}");
        assert!(unknown.is_empty(), "not in ENDPOINTS: {unknown:?}");
        assert_eq!(served.len(), ENDPOINTS.len(), "an endpoint is listed twice");
    }
}
