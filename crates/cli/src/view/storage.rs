//! The object store.

use hearth_proto::v1::{CollectGarbageResponse, StorageUsage, VerifySummary};
use serde_json::{Value, json};

use crate::human;
use crate::output::View;

/// One kind of objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    /// "chunks".
    pub kind: &'static str,
    /// How many.
    pub objects: u64,
    /// Bytes they take.
    pub bytes: u64,
}

impl View for UsageRow {
    const COLUMNS: &'static [&'static str] = &["KIND", "OBJECTS", "SIZE"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        vec![self.kind.to_owned(), self.objects.to_string(), human::bytes(self.bytes)]
    }

    fn value(&self) -> Value {
        json!({"kind": self.kind, "objects": self.objects, "bytes": self.bytes})
    }

    fn id(&self) -> String {
        self.kind.to_owned()
    }
}

/// Each kind and all together.
pub fn usage_rows(usage: &StorageUsage) -> Vec<UsageRow> {
    let mut rows = vec![
        UsageRow { kind: "chunks", objects: usage.chunk_objects, bytes: usage.chunk_bytes },
        UsageRow { kind: "manifests", objects: usage.manifest_objects, bytes: usage.manifest_bytes },
        UsageRow { kind: "other", objects: usage.other_objects, bytes: usage.other_bytes },
    ];
    let sum = |of: fn(&UsageRow) -> u64| rows.iter().map(of).fold(0, u64::saturating_add);
    rows.push(UsageRow { kind: "total", objects: sum(|row| row.objects), bytes: sum(|row| row.bytes) });
    rows
}

/// Where it is, and how much content its objects stand for.
pub fn usage_words(usage: &StorageUsage) -> String {
    let stored = usage_rows(usage).last().map_or(0, |row| row.bytes);
    let share = match usage.logical_bytes {
        0 => String::new(),
        logical => format!(", stored in {} % of it", u128::from(stored) * 100 / u128::from(logical)),
    };
    format!("{} of volume content in snapshots{share}; {}", human::bytes(usage.logical_bytes), usage.url)
}

/// Usage for programs.
pub fn usage_value(usage: &StorageUsage) -> Value {
    json!({
        "url": usage.url,
        "chunk_objects": usage.chunk_objects,
        "chunk_bytes": usage.chunk_bytes,
        "manifest_objects": usage.manifest_objects,
        "manifest_bytes": usage.manifest_bytes,
        "other_objects": usage.other_objects,
        "other_bytes": usage.other_bytes,
        "logical_bytes": usage.logical_bytes,
    })
}

/// What a collection did, in words.
pub fn collected_words(done: &CollectGarbageResponse) -> String {
    format!(
        "{} objects ({}) deleted, {} kept",
        done.deleted_objects,
        human::bytes(done.deleted_bytes),
        done.kept_objects
    )
}

/// What a collection did, for programs.
pub fn collected_value(done: &CollectGarbageResponse) -> Value {
    json!({
        "deleted_objects": done.deleted_objects,
        "deleted_bytes": done.deleted_bytes,
        "kept_objects": done.kept_objects,
    })
}

/// What a verification found, in words: a line for each object that is not as it should be, then the sum.
pub fn verified_words(summary: &VerifySummary) -> String {
    let findings: String = summary.findings.iter().map(|finding| format!("{finding}\n")).collect();
    let verdict = match summary.findings.len() {
        0 => "all is well".to_owned(),
        1 => "1 object is missing or damaged".to_owned(),
        count => format!("{count} objects are missing or damaged"),
    };
    format!(
        "{findings}{} snapshots, {} chunks, {} read: {verdict}\n",
        summary.snapshots,
        summary.chunks,
        human::bytes(summary.bytes)
    )
}

/// What a verification found, for programs.
pub fn verified_value(summary: &VerifySummary) -> Value {
    json!({
        "snapshots": summary.snapshots,
        "chunks": summary.chunks,
        "bytes": summary.bytes,
        "findings": summary.findings,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::OutputForm;
    use crate::output::render_list;

    #[test]
    fn usage_adds_up() {
        let usage = StorageUsage {
            url: "file:///store".to_owned(),
            chunk_objects: 10,
            chunk_bytes: 3 << 20,
            manifest_objects: 2,
            manifest_bytes: 1 << 20,
            other_objects: 1,
            other_bytes: 0,
            logical_bytes: 16 << 20,
        };
        let table = render_list(&usage_rows(&usage), OutputForm::Table).unwrap();
        assert_eq!(
            table,
            "KIND       OBJECTS  SIZE\nchunks     10       3 MiB\nmanifests  2        1 MiB\nother      1        0 B\n\
             total      13       4 MiB\n"
        );
        assert_eq!(usage_words(&usage), "16 MiB of volume content in snapshots, stored in 25 % of it; file:///store");
        assert!(usage_words(&StorageUsage::default()).starts_with("0 B of volume content in snapshots; "));
        let most = StorageUsage { chunk_bytes: u64::MAX, other_bytes: u64::MAX, ..usage };
        assert_eq!(usage_rows(&most)[3].bytes, u64::MAX);
    }

    #[test]
    fn findings_come_before_the_sum() {
        let mut summary = VerifySummary { snapshots: 2, chunks: 5, bytes: 5 << 19, findings: Vec::new() };
        assert_eq!(verified_words(&summary), "2 snapshots, 5 chunks, 2.5 MiB read: all is well\n");
        summary.findings.push("chunks/ab: missing (needed by snap-1)".to_owned());
        let words = verified_words(&summary);
        assert!(
            words.starts_with("chunks/ab: missing") && words.ends_with("1 object is missing or damaged\n"),
            "{words}"
        );
        assert_eq!(verified_value(&summary)["findings"][0], "chunks/ab: missing (needed by snap-1)");
    }

    #[test]
    fn a_collection_tells_what_went_and_what_stays() {
        let done = CollectGarbageResponse { deleted_objects: 3, deleted_bytes: 1024, kept_objects: 7 };
        assert_eq!(collected_words(&done), "3 objects (1 KiB) deleted, 7 kept");
        assert_eq!(collected_value(&done)["kept_objects"], 7);
    }
}
