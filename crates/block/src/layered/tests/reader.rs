//! Another reader of the same files, written by docs/storage.md alone: it sees what the engine sees.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use super::disk::Rng;
use super::files::{CHUNKS, Files, SIZE, run, write};
use crate::{BLOCK_BYTES, CHUNK_BYTES, Engine, LayeredVolume, Operation, Volume, VolumeQueue};

const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/lib/read_volume.py");

/// What the reader says of the files in this folder.
fn output(folder: &Path) -> Output {
    let names = ["map", "data", "seen", "base", "presence"].map(|name| folder.join(name));
    Command::new("python3").arg(READER).args(names).output().unwrap()
}

fn seen(folder: &Path) -> Vec<u8> {
    let output = output(folder);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(folder.join("seen")).unwrap()
}

/// A guest at random; `model` is what the volume holds.
fn work(volume: &LayeredVolume, rng: &mut Rng, model: &mut [u8]) {
    let mut queue = volume.open_queue(4).unwrap();
    for _ in 0..60 {
        let size = model.len() as u64;
        let offset = rng.below(size / 512) * 512;
        let length = (512 << rng.below(8)).min(size - offset);
        let range = offset as usize..(offset + length) as usize;
        match rng.below(6) {
            0 => {
                run(queue.as_mut(), Operation::WriteZeroes { may_unmap: true }, offset, length, &mut []);
                model[range].fill(0);
            }
            1 => small(queue.as_mut(), rng, model),
            _ => {
                let byte = rng.below(255) as u8 + 1;
                write(queue.as_mut(), offset, length as usize, byte);
                model[range].fill(byte);
            }
        }
    }
    run(queue.as_mut(), Operation::Flush, 0, 0, &mut []);
}

/// A block that becomes durable through the log.
fn small(queue: &mut dyn VolumeQueue, rng: &mut Rng, model: &mut [u8]) {
    run(queue, Operation::Flush, 0, 0, &mut []);
    let block = rng.below(model.len() as u64 / BLOCK_BYTES) * BLOCK_BYTES;
    let byte = rng.below(255) as u8 + 1;
    write(queue, block, 4096, byte);
    model[block as usize..][..4096].fill(byte);
    run(queue, Operation::Flush, 0, 0, &mut []);
}

#[test]
fn the_documentation_is_enough_to_read_a_volume() {
    let files = Files::new(false);
    let folder = files.folder.path();
    [0, 1, 4].iter().for_each(|chunk| files.bring(*chunk));
    let save_presence = || {
        let mut bytes = vec![0; 4096];
        files.presence.read_exact_at(&mut bytes, 0).unwrap();
        std::fs::write(folder.join("presence"), bytes).unwrap();
    };
    save_presence();
    let mut model: Vec<u8> = (0..CHUNKS)
        .flat_map(|chunk| vec![if [0, 1, 4].contains(&chunk) { 0xB0 + chunk as u8 } else { 0 }; CHUNK_BYTES as usize])
        .collect();
    assert!(seen(folder) == model, "a new volume");
    let mut rng = Rng::new(11);
    for life in 0..4 {
        let volume = files.open(Engine::Auto);
        if life == 2 {
            // Into the second page of the map.
            let size = 260 * CHUNK_BYTES + 4096;
            volume.grow(size).unwrap();
            model.resize(size as usize, 0);
        }
        work(&volume, &mut rng, &mut model);
        if life % 2 == 0 {
            volume.close_clean().unwrap();
        }
        drop(volume);
        assert!(seen(folder) == model, "life {life}");
    }

    // In use, with blocks in the log that `data` has lost with the power.
    let volume = files.open(Engine::Auto);
    let mut queue = volume.open_queue(4).unwrap();
    run(queue.as_mut(), Operation::Flush, 0, 0, &mut []);
    let free = |block: &u64| model[(block * BLOCK_BYTES) as usize..][..4096].iter().all(|byte| *byte == 0xB4);
    let logged: Vec<u64> = (4 * 128..5 * 128).filter(free).step_by(3).take(5).collect();
    assert_eq!(logged.len(), 5, "no block of the base is left");
    for (block, byte) in logged.iter().zip(1..) {
        write(queue.as_mut(), block * BLOCK_BYTES, 4096, byte);
        run(queue.as_mut(), Operation::Flush, 0, 0, &mut []);
    }
    for (block, byte) in logged.iter().zip(1..) {
        files.file("data").write_all_at(&[0xDD; 4096], block * BLOCK_BYTES).unwrap();
        model[(block * BLOCK_BYTES) as usize..][..4096].fill(byte);
    }
    assert!(seen(folder) == model, "the log");
    drop(queue);
    drop(volume);

    // And it refuses what is damaged.
    let mut page = [0; 4096];
    let map = files.file("map");
    map.read_exact_at(&mut page, 1_056_768).unwrap();
    page[100] ^= 1;
    map.write_all_at(&page, 1_056_768).unwrap();
    let refused = output(folder);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("damaged"));
    assert!(SIZE < model.len() as u64);
}
