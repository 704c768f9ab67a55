//! What the JSON schemas of several structs share. Only for the feature `schema`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::json;

use crate::absent::{Absent, AbsentList};
use crate::cpu_config::{Bitmap, KvmCapability};
use crate::id::{InstanceId, MAX_INSTANCE_ID_LEN, ResourceId};
use crate::limits::MAX_TAP_NAME_LEN;
use crate::mac::MacAddress;

/// Any text that the kernel takes as a path: not empty, and without NUL.
pub(crate) const PATH: &str = r"^[^\u0000]+$";
/// A text without NUL.
pub(crate) const NO_NUL: &str = r"^[^\u0000]*$";
/// Visible ASCII characters: see [`crate::checks::is_device_id`].
pub(crate) const VISIBLE: &str = "^[!-~]+$";

/// The schema of a field that is read with [`crate::serde_helpers::null_is_default`]: null only
/// goes in.
pub(crate) fn null_is_default<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    if generator.contract().is_deserialize() {
        generator.subschema_for::<Option<T>>()
    } else {
        generator.subschema_for::<T>()
    }
}

/// Requires a drive's disk. Only a vhost-user drive would have none.
pub(crate) fn require_path_on_host(schema: &mut Schema) {
    require(schema, "path_on_host");
    if let Some(field) =
        schema.ensure_object().get_mut("properties").and_then(|all| all.get_mut("path_on_host"))
    {
        field["type"] = "string".into();
    }
}

/// Requires interfaces in a request. A section of a configuration file may have none.
pub(crate) fn require_network_interfaces(schema: &mut Schema) {
    require(schema, "network_interfaces");
}

/// Requires a field that may be absent when it is read, and that a check then misses.
fn require(schema: &mut Schema, field: &str) {
    let required = schema.ensure_object().entry("required").or_insert_with(|| json!([]));
    if let Some(list) = required.as_array_mut()
        && !list.iter().any(|name| name == field)
    {
        list.push(field.into());
    }
}

/// Name of a tap, an absolute path, or nothing: see [`crate::NetworkInterface::host_dev_name`].
pub(crate) fn tap_name() -> String {
    // Visible ASCII characters without %, / and :.
    format!("^([!-$&-.0-9;-~]{{0,{MAX_TAP_NAME_LEN}}}|/[^\\u0000]*)$")
}

/// The schema of a type whose JSON is simpler than the type.
macro_rules! schema {
    ($type:ty, $name:literal, $schema:tt) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

schema!(InstanceId, "InstanceId", {
    "type": "string",
    "pattern": "^[0-9A-Za-z-]+$",
    "minLength": 1,
    "maxLength": MAX_INSTANCE_ID_LEN,
});
schema!(ResourceId, "ResourceId", { "type": "string", "pattern": "^[0-9A-Z_a-z]+$", "minLength": 1 });
schema!(MacAddress, "MacAddress", {
    "type": "string",
    // Not a group: the first byte is even.
    "pattern": "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$",
    "not": { "const": "00:00:00:00:00:00" },
});
schema!(KvmCapability, "KvmCapability", { "type": "string", "pattern": "^!?[0-9]{1,10}$" });
schema!(Bitmap<32>, "Bitmap32", { "type": "string", "pattern": "^(0b)?_*([01x]_*){0,32}$" });
schema!(Bitmap<64>, "Bitmap64", { "type": "string", "pattern": "^(0b)?_*([01x]_*){0,64}$" });
schema!(Absent, "Absent", { "type": "null" });
schema!(AbsentList, "AbsentList", { "type": "array", "items": {}, "maxItems": 0 });
