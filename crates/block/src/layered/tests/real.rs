//! The engine on real files, over io_uring and over threads.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::files::{CHUNKS, Files, SIZE, all, each, key, read, run, submit, wait, write};
use crate::map;
use crate::{BLOCK_BYTES, BlockError, CHUNK_BYTES, Engine, FreezeState, OfflineVolume, Operation, RateLimits, Volume};

#[test]
fn a_volume_keeps_what_is_written_over_its_base() {
    each(|engine, keys| {
        let files = Files::new(keys);
        [0, 1, 4].iter().for_each(|chunk| files.bring(*chunk));
        let volume = files.open(engine);
        {
            let mut queue = volume.open_queue(16).unwrap();
            let queue = queue.as_mut();
            assert!(all(&read(queue, 0, 8192), 0xB0));
            assert!(all(&read(queue, 2 * CHUNK_BYTES, 8192), 0));
            write(queue, 512, 512, 1);
            let block = read(queue, 0, 4096);
            assert!(all(&block[..512], 0xB0) && all(&block[512..1024], 1) && all(&block[1024..], 0xB0));
            write(queue, CHUNK_BYTES - 8192, 16384, 2);
            let across = read(queue, CHUNK_BYTES - 12288, 24576);
            assert!(all(&across[..4096], 0xB0) && all(&across[4096..20480], 2) && all(&across[20480..], 0xB1));
            run(queue, Operation::Discard, 4 * CHUNK_BYTES, 2 * BLOCK_BYTES, &mut []);
            run(queue, Operation::WriteZeroes { may_unmap: false }, 4 * CHUNK_BYTES + 8192 + 512, 8192, &mut []);
            let zeroed = read(queue, 4 * CHUNK_BYTES, 20480);
            assert!(all(&zeroed[..8192], 0) && all(&zeroed[8192..8704], 0xB4));
            assert!(all(&zeroed[8704..16896], 0) && all(&zeroed[16896..], 0xB4));
            run(queue, Operation::Flush, 0, 0, &mut []);
            // 1 MiB from an odd address crosses every kind of source.
            let mut large = vec![0u8; (1 << 20) + 1];
            run(queue, Operation::Read, 0, 0, &mut large[1..]);
            assert!(all(&large[1..513], 0xB0) && large[1 << 20] == 0xB1);
        }
        volume.close_clean().unwrap();
        drop(volume);
        let volume = files.open(engine);
        let mut queue = volume.open_queue(4).unwrap();
        assert!(all(&read(queue.as_mut(), CHUNK_BYTES - 8192, 16384), 2));
        if keys {
            let mut stored = [0; 512];
            files.file("data").read_exact_at(&mut stored, CHUNK_BYTES - 8192).unwrap();
            assert!(stored != [2; 512], "stored in clear");
        }
    });
}

#[test]
fn requests_wait_for_missing_chunks_and_are_repeatable() {
    each(|engine, keys| {
        let files = Files::new(keys);
        let volume = files.open(engine);
        let mut queue = volume.open_queue(8).unwrap();
        let mut bytes = vec![0u8; 16384];
        let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        submit(queue.as_mut(), Operation::Read, CHUNK_BYTES - 8192, 0, &buffers);
        queue.kick().unwrap();
        queue.drain(&mut |_| panic!("there is no data")).unwrap();
        assert_eq!((queue.in_flight(), queue.active()), (1, 0));
        assert_eq!(volume.pending_fetches(), [0, 1]);
        assert_eq!(*files.agent.asked.lock().unwrap(), [0, 1]);
        // Full blocks need no base.
        let mut block = vec![5u8; 4096];
        let write = [libc::iovec { iov_base: block.as_mut_ptr().cast(), iov_len: 4096 }];
        submit(queue.as_mut(), Operation::Write, CHUNK_BYTES, 0, &write);
        assert_eq!(wait(queue.as_mut(), "write").token, CHUNK_BYTES);
        files.bring(0);
        volume.presence_changed();
        assert_eq!(volume.pending_fetches(), [1]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                files.bring(1);
                volume.presence_changed();
            });
            wait(queue.as_mut(), "read").result.unwrap();
        });
        assert!(all(&bytes[..8192], 0xB0) && all(&bytes[8192..12288], 5) && all(&bytes[12288..], 0xB1));
    });
}

#[test]
fn a_second_opener_and_an_old_generation_are_refused() {
    let files = Files::new(false);
    let volume = files.open(Engine::Auto);
    assert!(matches!(files.try_open(Engine::Auto, 9), Err(BlockError::InUse)));
    assert!(matches!(OfflineVolume::open(files.files(), 9), Err(BlockError::InUse)));
    drop(volume);
    drop(files.try_open(Engine::Auto, 5).unwrap());
    let fenced = files.try_open(Engine::Auto, 4);
    assert!(matches!(fenced, Err(BlockError::Fenced { ours: 4, theirs: 5 })), "{fenced:?}");
    files.try_open(Engine::Auto, 5).unwrap();
}

/// Invariant 5: of openers that meet in any order, at most one has the volume, and one that was told that it has it with a generation
/// shuts out all older ones for good.
#[test]
fn invariant_5_two_writers_never_have_one_volume() {
    let files = Files::new(false);
    let (held, highest, opened) = (AtomicBool::new(false), AtomicU64::new(3), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for number in 0..3u64 {
            let (files, held, highest, opened) = (&files, &held, &highest, &opened);
            scope.spawn(move || {
                for round in 0..40u64 {
                    let before = highest.load(Ordering::SeqCst);
                    // Some of them are late.
                    let generation = (before + round % 3).saturating_sub(number % 2);
                    let result = if round % 4 == 3 {
                        OfflineVolume::open(files.files(), generation).map(|offline| {
                            assert!(!held.swap(true, Ordering::SeqCst), "two have the volume");
                            held.store(false, Ordering::SeqCst);
                            drop(offline);
                        })
                    } else {
                        files.try_open(Engine::ThreadPool, generation).map(|volume| {
                            assert!(!held.swap(true, Ordering::SeqCst), "two have the volume");
                            write(volume.open_queue(1).unwrap().as_mut(), 0, 4096, number as u8);
                            held.store(false, Ordering::SeqCst);
                            drop(volume);
                        })
                    };
                    match result {
                        Ok(()) => {
                            assert!(generation >= before, "generation {generation} after {before}");
                            highest.fetch_max(generation, Ordering::SeqCst);
                            opened.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(BlockError::InUse) => {}
                        Err(BlockError::Fenced { ours, theirs }) => assert!(ours == generation && theirs > ours),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(opened.into_inner() > 20);
}

#[test]
fn a_snapshot_is_the_volume_at_its_instant() {
    each(|engine, keys| {
        let files = Files::new(keys);
        [0, 1, 4].iter().for_each(|chunk| files.bring(*chunk));
        let volume = files.open(engine);
        let mut queue = volume.open_queue(16).unwrap();
        let queue = queue.as_mut();
        write(queue, 4096, 4096, 1);
        write(queue, 2 * CHUNK_BYTES, 4096, 1);
        volume.freeze_prepare().unwrap();
        let began = Instant::now();
        while volume.freeze_state() != FreezeState::Ready {
            queue.drain(&mut |_| {}).unwrap();
            assert!(began.elapsed() < Duration::from_secs(20));
        }
        let mut bytes = vec![2u8; 4096];
        let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 4096 }];
        submit(queue, Operation::Write, 4096, 0, &buffers);
        queue.kick().unwrap();
        queue.drain(&mut |_| panic!("a write during the preparation")).unwrap();
        let (stage, staged) = files.stage();
        let (held, set) = (volume.writes_held_since(), volume.freeze(stage).unwrap());
        assert!(
            set.iter().eq([0, 2]) && held.is_some_and(|held| held >= began) && volume.writes_held_since().is_none()
        );
        wait(queue, "the write").result.unwrap();
        let view = staged.view();
        assert!(view.is_staged(0).unwrap() && !view.is_staged(2).unwrap() && *view.frozen() == set);
        volume.stage_chunk(2).unwrap();
        while !view.is_staged(2).unwrap() {
            queue.drain(&mut |_| {}).unwrap();
            assert!(began.elapsed() < Duration::from_secs(20));
        }
        assert!(!view.is_broken().unwrap());
        let mut was = vec![0u8; CHUNK_BYTES as usize];
        files.file("stage").read_exact_at(&mut was, 0).unwrap();
        if keys {
            crate::xts::Xts::new(&key(1)).decrypt(&mut was, 0);
        }
        assert!(all(&was[..4096], 0xB0) && all(&was[4096..8192], 1) && all(&was[8192..], 0xB0));
        assert!(all(&read(queue, 4096, 4096), 2));
        volume.thaw(false);
        // Only what was written after the instant is left for the next one.
        volume.freeze_prepare().unwrap();
        while volume.freeze_state() != FreezeState::Ready {
            queue.drain(&mut |_| {}).unwrap();
        }
        assert_eq!(volume.freeze(files.stage().0).unwrap().iter().collect::<Vec<_>>(), [0]);
        volume.thaw(true);
    });
}

#[test]
fn a_copy_that_waits_for_the_base_gives_up_when_thawed() {
    each(|engine, keys| {
        let files = Files::new(keys);
        let volume = files.open(engine);
        let mut queue = volume.open_queue(16).unwrap();
        let queue = queue.as_mut();
        write(queue, 4096, 4096, 1);
        for round in 0..3 {
            volume.freeze_prepare().unwrap();
            let began = Instant::now();
            while volume.freeze_state() != FreezeState::Ready {
                queue.drain(&mut |_| {}).unwrap();
                assert!(began.elapsed() < Duration::from_secs(20), "round {round}");
            }
            assert_eq!(volume.freeze(files.stage().0).unwrap().len(), 1);
            volume.stage_chunk(0).unwrap();
            let mut bytes = vec![2u8; 4096];
            let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 4096 }];
            submit(queue, Operation::Write, 8192, 0, &buffers);
            queue.kick().unwrap();
            queue.drain(&mut |_| panic!("written over a chunk that is not in the stage")).unwrap();
            assert_eq!(volume.pending_fetches(), [0]);
            volume.thaw(true);
            wait(queue, "the write").result.unwrap();
        }
    });
}

#[test]
fn a_volume_without_queues_freezes_in_the_caller() {
    let files = Files::new(false);
    [0, 1, 4].iter().for_each(|chunk| files.bring(*chunk));
    let volume = files.open(Engine::Auto);
    write(volume.open_queue(1).unwrap().as_mut(), CHUNK_BYTES, 4096, 1);
    volume.freeze_prepare().unwrap();
    assert!(matches!(volume.freeze_prepare(), Err(BlockError::FreezeState(..))));
    let (stage, staged) = files.stage();
    assert_eq!(volume.freeze(stage).unwrap().len(), 1);
    volume.stage_chunk(1).unwrap();
    assert!(staged.view().is_staged(1).unwrap());
    volume.thaw(false);
    volume.close_clean().unwrap();
    let offline = OfflineVolume::open(files.files(), 3).unwrap();
    assert!(offline.dirty_chunks().is_empty());
}

#[test]
fn the_agent_reads_a_detached_volume() {
    for keys in [false, true] {
        let files = Files::new(keys);
        files.bring(1);
        let volume = files.open(Engine::Auto);
        write(volume.open_queue(1).unwrap().as_mut(), CHUNK_BYTES, 4096, 1);
        volume.close_clean().unwrap();
        drop(volume);
        let offline = OfflineVolume::open(files.files(), 3).unwrap();
        assert_eq!(offline.dirty_chunks().iter().collect::<Vec<_>>(), [1]);
        let mut chunk = vec![0xEE; CHUNK_BYTES as usize];
        offline.read_chunk(1, &mut chunk).unwrap();
        assert!(all(&chunk[..4096], 1) && all(&chunk[4096..], 0xB1));
        assert!(matches!(offline.read_chunk(4, &mut chunk), Err(BlockError::ChunkMissing { chunk: 4 })));
        files.bring(4);
        offline.read_chunk(4, &mut chunk).unwrap();
        assert!(all(&chunk, 0xB4));
        offline.grow(SIZE + 4096).unwrap();
        offline.read_chunk(CHUNKS, &mut chunk).unwrap();
        assert!(all(&chunk, 0));
        offline.clear_dirty().unwrap();
        drop(offline);
        let offline = OfflineVolume::open(files.files(), 3).unwrap();
        assert!(offline.dirty_chunks().is_empty() && offline.header().clean);
    }
}

#[test]
fn a_killed_volume_counts_all_it_holds_as_dirty() {
    let files = Files::new(false);
    let volume = files.open(Engine::Auto);
    write(volume.open_queue(1).unwrap().as_mut(), 4 * CHUNK_BYTES, 4096, 1);
    volume.sync().unwrap();
    drop(volume);
    let offline = OfflineVolume::open(files.files(), 3).unwrap();
    assert_eq!(offline.dirty_chunks().iter().collect::<Vec<_>>(), [2, 3, 4, 5]);
    offline.clear_dirty().unwrap();
    assert!(offline.header().clean);
}

#[test]
fn a_volume_grows_while_it_is_used() {
    each(|engine, keys| {
        let files = Files::new(keys);
        let volume = files.open(engine);
        let mut queue = volume.open_queue(4).unwrap();
        // Into another page of the map.
        let size = 300 * CHUNK_BYTES;
        volume.grow(size).unwrap();
        assert_eq!(volume.size_bytes(), size);
        assert!(all(&read(queue.as_mut(), size - 4096, 4096), 0));
        write(queue.as_mut(), size - 4096, 4096, 3);
        drop(queue);
        volume.close_clean().unwrap();
        assert!(matches!(volume.grow(SIZE), Err(BlockError::Map(map::MapError::Shrink { .. }))));
        drop(volume);
        let volume = files.open(engine);
        assert!(all(&read(volume.open_queue(1).unwrap().as_mut(), size - 4096, 4096), 3));
    });
}

#[test]
fn rate_limits_hold_and_can_be_lifted() {
    each(|engine, keys| {
        let files = Files::new(keys);
        let volume = files.open(engine);
        let mut queue = volume.open_queue(64).unwrap();
        volume.set_rate_limits(RateLimits { iops: 100, bytes_per_second: 0 });
        let mut bytes = vec![1u8; 4096];
        let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 4096 }];
        let began = Instant::now();
        for block in 0..20 {
            submit(queue.as_mut(), Operation::Write, block * 4096, 0, &buffers);
        }
        let mut done = 0;
        queue.kick().unwrap();
        while done < 20 {
            queue.drain(&mut |_| done += 1).unwrap();
            let mut fds = [PollFd::new(queue.completion_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(if done < 20 { 1000u16 } else { 0 })).unwrap();
        }
        // 20 operations at 100 per second, of which 6 may go at once: never less than 140 ms.
        assert!(began.elapsed() >= Duration::from_millis(139), "{:?}", began.elapsed());
        volume.set_rate_limits(RateLimits { iops: 1, bytes_per_second: 0 });
        for block in 0..3 {
            submit(queue.as_mut(), Operation::Write, block * 4096, 0, &buffers);
        }
        queue.kick().unwrap();
        volume.set_rate_limits(RateLimits::default());
        let mut done = 0;
        while done < 3 {
            queue.drain(&mut |_| done += 1).unwrap();
        }
    });
}

#[test]
fn dropping_a_queue_frees_what_it_held() {
    each(|engine, keys| {
        let files = Files::new(keys);
        let volume = files.open(engine);
        let mut bytes = vec![1u8; 4096];
        let buffers = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 512 }];
        {
            let mut queue = volume.open_queue(4).unwrap();
            // Waits for the base, and then is gone.
            submit(queue.as_mut(), Operation::Write, 512, 0, &buffers);
            queue.kick().unwrap();
        }
        files.bring(0);
        let mut queue = volume.open_queue(4).unwrap();
        write(queue.as_mut(), 1024, 512, 7);
        let block = read(queue.as_mut(), 0, 4096);
        assert!(all(&block[..1024], 0xB0) && all(&block[1024..1536], 7));
        assert!(bytes[0] == 1 && queue.in_flight() == 0);
        bytes[0] = 2;
    });
}

#[test]
fn hostile_files_are_refused() {
    let mut files = Files::new(false);
    files.file("data").set_len(SIZE - 4096).unwrap();
    assert!(matches!(files.try_open(Engine::Auto, 3), Err(BlockError::DataTooShort { .. })));
    files.file("data").set_len(SIZE).unwrap();
    let unsealed = File::from(memfd_create(c"presence", MFdFlags::MFD_CLOEXEC).unwrap());
    unsealed.set_len(4096).unwrap();
    let sealed = std::mem::replace(&mut files.presence, unsealed);
    assert!(matches!(files.try_open(Engine::Auto, 3), Err(BlockError::Presence(_))));
    files.presence = sealed;
    let mut map = files.file("map");
    map.set_len(9000).unwrap();
    assert!(matches!(files.try_open(Engine::Auto, 3), Err(BlockError::Map(_))));
    map.write_all(&[0; 8192]).unwrap();
    assert!(matches!(files.try_open(Engine::Auto, 3), Err(BlockError::Map(_))));
    assert_eq!(files.file("data").metadata().unwrap().size(), SIZE);
    assert!(files.presence.as_fd().try_clone_to_owned().is_ok());
}

/// Several queues on threads of their own, an agent that brings chunks late, and one snapshot after the other: nothing hangs
/// and every thread reads what it wrote.
#[test]
fn queues_on_several_threads_share_a_volume() {
    each(|engine, keys| {
        let files = Files::new(keys);
        let volume = files.open(engine);
        let (volume, files, over) = (&volume, &files, &AtomicBool::new(false));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3u64)
                .map(|thread| {
                    scope.spawn(move || {
                        let mut queue = volume.open_queue(8).unwrap();
                        let queue = queue.as_mut();
                        // Sectors of the same blocks: each thread has every fourth one.
                        let sectors: Vec<u64> =
                            (0..60).map(|at| at / 20 * 4 * CHUNK_BYTES / 2 + (at % 20 * 4 + thread) * 512).collect();
                        for round in 1..=12u8 {
                            sectors.iter().for_each(|offset| write(queue, *offset, 512, round * 4 + thread as u8));
                            run(queue, Operation::Flush, 0, 0, &mut []);
                            for offset in &sectors {
                                assert!(
                                    all(&read(queue, *offset, 512), round * 4 + thread as u8),
                                    "sector at {offset}"
                                );
                            }
                        }
                    })
                })
                .collect();
            let agent = scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    for chunk in std::mem::take(&mut *files.agent.asked.lock().unwrap()) {
                        files.bring(chunk);
                        volume.presence_changed();
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let snapshots = scope.spawn(move || {
                // A queue that is always there to do the volume's own work.
                let mut queue = volume.open_queue(1).unwrap();
                let mut done = 0;
                while !over.load(Ordering::Relaxed) {
                    volume.freeze_prepare().unwrap();
                    while volume.freeze_state() == FreezeState::Preparing {
                        queue.drain(&mut |_| {}).unwrap();
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    let (stage, staged) = files.stage();
                    let set = match volume.freeze(stage) {
                        Ok(set) => set,
                        // The queue that prepared it ended: it is asked for again.
                        Err(BlockError::Freeze(error)) if error.raw_os_error() == Some(libc::ECANCELED) => continue,
                        Err(error) => panic!("{error}"),
                    };
                    let view = staged.view();
                    for chunk in set.iter() {
                        volume.stage_chunk(chunk).unwrap();
                        let began = Instant::now();
                        while !view.is_staged(chunk).unwrap() {
                            queue.drain(&mut |_| {}).unwrap();
                            assert!(began.elapsed() < Duration::from_secs(20), "chunk {chunk} is not staged");
                        }
                    }
                    volume.thaw(false);
                    done += 1;
                }
                done
            });
            let results: Vec<_> = workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            over.store(true, Ordering::Relaxed);
            agent.join().unwrap();
            assert!(snapshots.join().unwrap() > 0);
            results.into_iter().for_each(|result| result.unwrap());
        });
        volume.close_clean().unwrap();
    });
}
