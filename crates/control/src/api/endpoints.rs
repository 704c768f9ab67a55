//! [`Endpoint`]: one row of the API's table of endpoints, and how a request finds its row.
//!
//! The rows are in [`routes`](super::routes). Nothing else routes a request, so the table is the
//! whole API. A test compares it with `docs/api/openapi.yaml`.

use crate::http::Method;

/// An endpoint: a method, a path, and what reads its requests.
#[derive(Debug)]
pub struct Endpoint<R> {
    /// The method.
    pub method: Method,
    /// The path. It has at most one parameter, a segment in braces: `/drives/{drive_id}`.
    pub path: &'static str,
    /// Whether a request may not have further segments. Otherwise they are ignored.
    pub(super) exact: bool,
    pub(super) target: Target<R>,
}

/// What an endpoint's requests ask for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<R> {
    /// A command, and what reads it.
    Command(R),
    /// The stream of events.
    Events,
}

impl<R> Endpoint<R> {
    pub(super) const fn get(path: &'static str, read: R) -> Endpoint<R> {
        Endpoint { method: Method::Get, path, exact: false, target: Target::Command(read) }
    }

    pub(super) const fn put(path: &'static str, read: R) -> Endpoint<R> {
        Endpoint { method: Method::Put, path, exact: false, target: Target::Command(read) }
    }

    pub(super) const fn patch(path: &'static str, read: R) -> Endpoint<R> {
        Endpoint { method: Method::Patch, path, exact: false, target: Target::Command(read) }
    }

    pub(super) const fn delete(path: &'static str, read: R) -> Endpoint<R> {
        Endpoint { method: Method::Delete, path, exact: false, target: Target::Command(read) }
    }

    pub(super) const fn events(path: &'static str) -> Endpoint<R> {
        Endpoint { method: Method::Get, path, exact: false, target: Target::Events }
    }

    fn segments(&self) -> impl Iterator<Item = &'static str> + use<R> {
        self.path.split('/').filter(|segment| !segment.is_empty())
    }

    /// How many segments of `path` are the endpoint's. `None` if the path is another endpoint's. A
    /// parameter at the end may be missing: then the id is empty, which has an error of its own.
    fn matches(&self, path: &[&str]) -> Option<usize> {
        let named = self.segments().filter(|segment| !segment.starts_with('{')).count();
        let len = if path.len() == named { named } else { self.segments().count() };
        let has_further = path.len() > len;
        // The root has no segment that would tell it from other paths.
        let fits = path.len() == len || has_further && len > 0 && !self.exact;
        let same = |(own, given): (&str, &&str)| own == *given || own.starts_with('{');
        (fits && self.segments().zip(path).all(same)).then_some(len)
    }

    /// The part of `path` that stands for the parameter.
    pub(super) fn parameter<'a>(&self, path: &[&'a str]) -> &'a str {
        let at = self.segments().position(|segment| segment.starts_with('{'));
        at.and_then(|at| path.get(at)).copied().unwrap_or_default()
    }
}

/// The endpoint of a request: of those that match its path, the one with the most segments.
pub(super) fn find<R>(
    table: &'static [Endpoint<R>],
    method: Method,
    path: &[&str],
) -> Option<&'static Endpoint<R>> {
    let matching = table.iter().filter(|endpoint| endpoint.method == method);
    let longest = matching.filter_map(|endpoint| Some((endpoint.matches(path)?, endpoint)));
    longest.max_by_key(|(len, _)| *len).map(|(_, endpoint)| endpoint)
}
