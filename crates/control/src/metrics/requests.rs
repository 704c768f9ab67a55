//! [`ApiStats`]: what the API thread counts.

use sync::Counter;

use super::operations::Durations;
use super::report::{Group, Value};
use crate::http::Method;

/// The requests that are counted: method, first segment of the path, names of the counters. In the
/// order of a line within each method.
const COUNTED: [(Method, &str, &str, Option<&str>); 24] = [
    (Method::Get, "", "instance_info_count", None),
    (Method::Get, "machine-config", "machine_cfg_count", None),
    (Method::Get, "mmds", "mmds_count", None),
    (Method::Get, "version", "vmm_version_count", None),
    (Method::Get, "hotplug", "hotplug_memory_count", None),
    (Method::Patch, "drives", "drive_count", Some("drive_fails")),
    (Method::Patch, "network-interfaces", "network_count", Some("network_fails")),
    (Method::Patch, "machine-config", "machine_cfg_count", Some("machine_cfg_fails")),
    (Method::Patch, "mmds", "mmds_count", Some("mmds_fails")),
    (Method::Patch, "hotplug", "hotplug_memory_count", Some("hotplug_memory_fails")),
    (Method::Patch, "pmem", "pmem_count", Some("pmem_fails")),
    (Method::Put, "actions", "actions_count", Some("actions_fails")),
    (Method::Put, "boot-source", "boot_source_count", Some("boot_source_fails")),
    (Method::Put, "drives", "drive_count", Some("drive_fails")),
    (Method::Put, "logger", "logger_count", Some("logger_fails")),
    (Method::Put, "machine-config", "machine_cfg_count", Some("machine_cfg_fails")),
    (Method::Put, "cpu-config", "cpu_cfg_count", Some("cpu_cfg_fails")),
    (Method::Put, "metrics", "metrics_count", Some("metrics_fails")),
    (Method::Put, "network-interfaces", "network_count", Some("network_fails")),
    (Method::Put, "mmds", "mmds_count", Some("mmds_fails")),
    (Method::Put, "vsock", "vsock_count", Some("vsock_fails")),
    (Method::Put, "pmem", "pmem_count", Some("pmem_fails")),
    (Method::Put, "serial", "serial_count", Some("serial_fails")),
    (Method::Put, "hotplug", "hotplug_memory_count", Some("hotplug_memory_fails")),
];

/// An endpoint whose requests are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CountedRequest(usize);

impl CountedRequest {
    /// The endpoint of a request; `None` if its requests are not counted.
    pub(crate) fn of(method: Method, path: &str) -> Option<Self> {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        COUNTED.iter().position(|counted| (counted.0, counted.1) == (method, first)).map(CountedRequest)
    }
}

/// Requests to one endpoint.
#[derive(Debug, Default)]
struct RequestStats {
    count: Counter,
    fails: Counter,
}

/// Counters of the API thread.
#[derive(Debug, Default)]
pub(crate) struct ApiStats {
    requests: [RequestStats; COUNTED.len()],
    /// Requests that used something deprecated.
    pub(crate) deprecated: Counter,
    /// Operations, from the request to its answer.
    pub(crate) durations: Durations,
}

impl ApiStats {
    /// Counts a request when it has arrived.
    pub(crate) fn count(&self, endpoint: Option<CountedRequest>) {
        if let Some(CountedRequest(at)) = endpoint {
            self.requests[at].count.add(1);
        }
    }

    /// Counts a request that gets an error, whatever the reason.
    pub(crate) fn count_failure(&self, endpoint: Option<CountedRequest>) {
        if let Some(CountedRequest(at)) = endpoint {
            self.requests[at].fails.add(1);
        }
    }

    /// The group of the requests with this method.
    pub(super) fn group(&self, name: &'static str, method: Method) -> Group {
        let mut fields = Vec::new();
        for ((of, _, count, fails), stats) in COUNTED.iter().zip(&self.requests) {
            if *of == method {
                fields.push((*count, Value::Count(stats.count.get())));
                fields.extend(fails.map(|fails| (fails, Value::Count(stats.fails.get()))));
            }
        }
        Group::new(name, fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_method_and_first_segment() {
        let stats = ApiStats::default();
        for (method, path) in [
            (Method::Put, "/drives/a"),
            (Method::Put, "//drives/b/c"),
            (Method::Patch, "/drives/a"),
            (Method::Get, "/"),
            (Method::Get, "/vm/config"),
            (Method::Put, "/mmds/config"),
        ] {
            stats.count(CountedRequest::of(method, path));
        }
        stats.count_failure(CountedRequest::of(Method::Put, "/drives/b"));
        stats.count_failure(CountedRequest::of(Method::Get, "/"));
        let counted = |name, method| -> Vec<_> {
            let fields = stats.group(name, method).fields.into_iter();
            fields.filter(|(_, value)| *value != Value::Count(0)).collect()
        };
        assert_eq!(
            counted("put", Method::Put),
            [
                ("drive_count", Value::Count(2)),
                ("drive_fails", Value::Count(1)),
                ("mmds_count", Value::Count(1)),
            ]
        );
        assert_eq!(counted("patch", Method::Patch), [("drive_count", Value::Count(1))]);
        assert_eq!(counted("get", Method::Get), [("instance_info_count", Value::Count(1))]);
    }
}
