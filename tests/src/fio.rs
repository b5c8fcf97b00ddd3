//! fio for guests that have no package manager: this machine's, with its libraries, on a disk of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::disks::WRITER;

/// How a guest calls it where the disk is mounted at /mnt.
pub const FIO: &str = "/mnt/ld.so --library-path /mnt/lib /mnt/fio";

/// Writes blocks of several sizes at random places, flushes now and then, and reads everything back. `DISK_*` in the environment
/// name the disks.
const JOB: &str = "\
[global]
ioengine=libaio
iodepth=8
direct=1
thread
rw=randwrite
bssplit=512/25:4k/50:32k/25
size=${SIZE}
fsync=8
verify=crc32c
verify_interval=512
verify_fatal=1
randseed=${SEED}
loops=${LOOPS}
[one]
filename=${DISK_ONE}
[two]
filename=${DISK_TWO}
[three]
filename=${DISK_THREE}
";

/// Libraries that it needs for this; the others, of engines for storage in the network, are many times as large.
const LIBRARIES: [&str; 5] = ["libc.so.6", "libm.so.6", "libaio.so.1", "libz.so.1", "libnuma.so.1"];

/// Makes the disk image in `folder`: one ext4 file system without partitions.
pub fn disk_image(folder: &Path) -> PathBuf {
    let (tree, image) = (folder.join("fio"), folder.join("fio.raw"));
    let libraries = tree.join("lib");
    std::fs::create_dir_all(&libraries).unwrap();
    let program = Path::new("/usr/bin/fio");
    assert!(program.exists(), "{} is not installed: run scripts/test, or install fio", program.display());
    let placeholder = placeholder(program, folder);
    for line in output(Command::new("ldd").arg(program)).lines() {
        let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else { continue };
        let name = Path::new(library).file_name().unwrap().to_str().unwrap();
        match name.starts_with("ld-") {
            true => std::fs::copy(library, tree.join("ld.so")),
            false if LIBRARIES.contains(&name) => std::fs::copy(library, libraries.join(name)),
            false => std::fs::copy(&placeholder, libraries.join(name)),
        }
        .unwrap();
    }
    std::fs::copy(program, tree.join("fio")).unwrap();
    std::fs::write(tree.join("job"), JOB).unwrap();
    std::fs::write(tree.join("writer"), WRITER).unwrap();
    let mut made = Command::new("mke2fs");
    made.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"]);
    output(made.args([tree.as_path(), image.as_path(), Path::new("16M")]));
    std::fs::remove_dir_all(tree).unwrap();
    image
}

/// A library with every function that `program` wants of any library, under the same version; each of them ends it.
fn placeholder(program: &Path, folder: &Path) -> PathBuf {
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut code = String::from("void abort(void);\n");
    for line in output(Command::new("nm").args(["-D", "--undefined-only"]).arg(program)).lines() {
        let Some(symbol) = line.split_whitespace().next_back() else { continue };
        let (name, version) = symbol.split_once('@').unwrap_or((symbol, ""));
        if version.starts_with("GLIBC") || version.starts_with("LIBAIO") || name.starts_with('_') {
            continue;
        }
        code += &format!("void {name}(void) {{ abort(); }}\n");
        versions.entry(version.to_owned()).or_default().push(name.to_owned());
    }
    let nodes = versions.iter().filter(|(version, _)| !version.is_empty());
    let script: String = nodes.map(|(version, names)| format!("{version} {{ {}; }};\n", names.join("; "))).collect();
    let [source, map, library] = ["placeholder.c", "placeholder.map", "placeholder.so"].map(|name| folder.join(name));
    std::fs::write(&source, code).unwrap();
    std::fs::write(&map, script).unwrap();
    let script = format!("-Wl,--version-script={}", map.display());
    output(Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).args([&library, &source]).arg(script));
    library
}

fn output(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}
