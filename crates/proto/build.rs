//! Generates messages and services from `proto/` without needing protoc.

use std::path::{Path, PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // Clients see the API alone through reflection, not the control plane's records.
    let api = protox::compile(files_in(&root.join("hearth/v1"))?, [&root])?;
    std::fs::write(out.join("hearth.v1.descriptors"), api.encode_to_vec())?;
    let mut files = files_in(&root.join("hearth/v1"))?;
    files.extend(files_in(&root.join("hearth/record/v1"))?);
    let all = protox::compile(files, [&root])?;
    tonic_prost_build::configure().bytes(".hearth.v1").compile_fds(all)?;
    Ok(())
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>, std::io::Error> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "proto"));
    files.sort();
    Ok(files)
}
