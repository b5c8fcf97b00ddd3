//! The house has floors: a crate uses only crates below its own (docs/architecture.md).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeMap;
use std::path::Path;

fn floor(crate_name: &str) -> Option<u8> {
    Some(match crate_name {
        "types" | "proto" => 0,
        "block" | "store" | "scheduler" | "net" => 1,
        "vmm" | "snapshot" | "driver" => 2,
        "agent" | "control" => 3,
        "daemon" | "cli" => 4,
        _ => return None,
    })
}

#[test]
fn crates_use_only_lower_floors() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let mut uses: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(&crates).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let manifest: toml::Table = std::fs::read_to_string(path.join("Cargo.toml")).unwrap().parse().unwrap();
        let list = uses.entry(name).or_default();
        for table in ["dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(table).and_then(|t| t.as_table()) else { continue };
            list.extend(table.keys().filter_map(|key| key.strip_prefix("hearth-")).map(str::to_owned));
        }
    }
    assert!(uses.len() >= 12, "only {} crates found", uses.len());
    for (name, used) in &uses {
        let own = floor(name).unwrap_or_else(|| panic!("crate {name} has no floor: add it to the plan of the house"));
        for other in used {
            let below = floor(other).unwrap_or_else(|| panic!("{name} uses hearth-{other}, which has no floor"));
            assert!(below < own, "{name} (floor {own}) uses {other} (floor {below})");
        }
    }
}
