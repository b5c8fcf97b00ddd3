//! What the API's objects look like in tables and as JSON.

pub mod account;
pub mod bundle;
pub mod fast_restore;
pub mod host;
pub mod image;
pub mod instance;
pub mod snapshot;
pub mod storage;
pub mod task;
pub mod volume;

use hearth_proto::v1::{Resources, StateReason, Tag};
use serde_json::{Map, Value, json};

/// Names of a proto enum's values as EC2 writes them: "INSTANCE_STATE_SHUTTING_DOWN" → "shutting-down".
pub fn enum_name(proto_name: &str, prefix: &str) -> String {
    proto_name.strip_prefix(prefix).unwrap_or(proto_name).to_ascii_lowercase().replace('_', "-")
}

/// Tags as an object.
pub fn tags(tags: &[Tag]) -> Value {
    Value::Object(tags.iter().map(|tag| (tag.key.clone(), Value::String(tag.value.clone()))).collect::<Map<_, _>>())
}

/// Tags for a table cell.
pub fn tags_cell(tags: &[Tag], without: &str) -> String {
    let pair = |tag: &Tag| format!("{}={}", tag.key, tag.value);
    tags.iter().filter(|tag| tag.key != without).map(pair).collect::<Vec<_>>().join(",")
}

/// Value of a tag, or nothing.
pub fn tag_value<'a>(tags: &'a [Tag], key: &str) -> &'a str {
    tags.iter().find(|tag| tag.key == key).map(|tag| tag.value.as_str()).unwrap_or_default()
}

/// A resource vector as an object.
pub fn resources(resources: Option<&Resources>) -> Value {
    let Some(r) = resources else { return Value::Null };
    json!({
        "vcpus": r.vcpus,
        "memory_mib": r.memory_mib,
        "ecu_milli": r.ecu_milli,
        "instance_store_bytes": r.instance_store_bytes,
    })
}

/// A reason as an object.
pub fn reason(reason: Option<&StateReason>) -> Value {
    match reason {
        Some(reason) if !reason.code.is_empty() => json!({"code": reason.code, "message": reason.message}),
        _ => Value::Null,
    }
}
