use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;

use super::*;
use crate::task::{Call, Task, Verdict};
use crate::{Completion, Operation, Request};

const MIB: u64 = 1 << 20;

fn file_of(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

/// Both engines; only the pool on machines where the administrator forbids io_uring (then that is all there is to test).
fn engines() -> Vec<Engine> {
    let probe = io_uring::IoUring::new(2).map(drop);
    match probe.map_err(|error| error.raw_os_error()) {
        Err(Some(libc::EPERM | libc::ENOSYS)) => {
            eprintln!("io_uring is forbidden here: testing the thread pool alone");
            vec![Engine::ThreadPool]
        }
        _ => vec![Engine::IoUring, Engine::ThreadPool],
    }
}

fn volume(file: &File, engine: Engine) -> RawFile {
    RawFile::new(file.try_clone().unwrap(), false, engine).unwrap()
}

fn iovec(buffer: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }
}

fn request(operation: Operation, offset: u64, length: u64, buffers: &[libc::iovec]) -> Request<'_> {
    Request { operation, offset, length, buffers, token: offset ^ 0x55 }
}

/// Submits and waits for exactly this many completions, sleeping on the completion descriptor only.
fn wait_for(queue: &mut dyn VolumeQueue, count: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    queue.kick().unwrap();
    loop {
        queue.drain(&mut |completion| done.push(completion)).unwrap();
        if done.len() >= count {
            break;
        }
        let mut fds = [PollFd::new(queue.completion_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(10_000u16)).unwrap();
    }
    assert_eq!(done.len(), count);
    done
}

fn run(queue: &mut dyn VolumeQueue, request: Request<'_>) -> Result<(), i32> {
    // SAFETY: every caller keeps the buffers alive until this returns.
    unsafe { queue.submit(request).unwrap() };
    let completion = wait_for(queue, 1).remove(0);
    assert_eq!(completion.token, request.token);
    completion.result.map_err(|error| error.source.raw_os_error().unwrap())
}

#[test]
fn writes_and_reads_scattered_buffers() {
    for engine in engines() {
        let file = file_of(MIB);
        let mut queue = volume(&file, engine).open_queue(8).unwrap();
        let (mut first, mut second) = (vec![1u8; 700], vec![2u8; 324]);
        let buffers = [iovec(&mut first), iovec(&mut second)];
        run(queue.as_mut(), request(Operation::Write, 512, 0, &buffers)).unwrap();
        let mut stored = vec![0u8; 1024];
        file.read_exact_at(&mut stored, 512).unwrap();
        assert!(stored[..700].iter().all(|byte| *byte == 1) && stored[700..].iter().all(|byte| *byte == 2));
        let mut back = vec![0u8; 1024];
        let (left, right) = back.split_at_mut(13);
        run(queue.as_mut(), request(Operation::Read, 512, 0, &[iovec(left), iovec(right)])).unwrap();
        assert_eq!(back, stored);
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn more_iovecs_than_one_call_takes() {
    for engine in engines() {
        let file = file_of(4 * MIB);
        let mut queue = volume(&file, engine).open_queue(2).unwrap();
        let mut bytes: Vec<u8> = (0..3000u32 * 512).map(|index| (index / 512 % 251) as u8).collect();
        let buffers: Vec<_> = bytes.chunks_mut(512).map(iovec).collect();
        run(queue.as_mut(), request(Operation::Write, 0, 0, &buffers)).unwrap();
        let mut stored = vec![0u8; bytes.len()];
        file.read_exact_at(&mut stored, 0).unwrap();
        assert_eq!(stored, bytes);
    }
}

#[test]
fn discard_frees_space_and_zeroes_read_as_zeros() {
    for engine in engines() {
        let mut file = file_of(0);
        file.write_all(&vec![7u8; MIB as usize]).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        let mut queue = volume(&file, engine).open_queue(8).unwrap();
        run(queue.as_mut(), request(Operation::Discard, 0, MIB / 2, &[])).unwrap();
        run(queue.as_mut(), request(Operation::WriteZeroes { may_unmap: false }, MIB / 2, 4096 + 512, &[])).unwrap();
        run(queue.as_mut(), request(Operation::WriteZeroes { may_unmap: true }, MIB / 4 * 3, 512, &[])).unwrap();
        run(queue.as_mut(), request(Operation::Flush, 0, 0, &[])).unwrap();
        assert!(file.metadata().unwrap().blocks() < before);
        assert_eq!(file.metadata().unwrap().len(), MIB);
        let mut content = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut content).unwrap();
        for (index, byte) in content.iter().enumerate() {
            let index = index as u64;
            let zeroed = index < MIB / 2 + 4608 || (MIB / 4 * 3..MIB / 4 * 3 + 512).contains(&index);
            assert_eq!(*byte, if zeroed { 0 } else { 7 }, "byte {index}");
        }
    }
}

#[test]
fn bounds_and_read_only_are_errors_of_the_request_alone() {
    for engine in engines() {
        let file = file_of(MIB);
        let mut queue = volume(&file, engine).open_queue(8).unwrap();
        let mut buffer = vec![0u8; 1024];
        let buffers = [iovec(&mut buffer)];
        assert_eq!(run(queue.as_mut(), request(Operation::Read, MIB - 512, 0, &buffers)), Err(libc::EINVAL));
        assert_eq!(run(queue.as_mut(), request(Operation::Write, u64::MAX - 5, 0, &buffers)), Err(libc::EINVAL));
        assert_eq!(run(queue.as_mut(), request(Operation::Discard, 512, u64::MAX, &[])), Err(libc::EINVAL));
        assert_eq!(run(queue.as_mut(), request(Operation::Read, MIB - 1024, 0, &buffers)), Ok(()));

        let read_only = RawFile::new(file.try_clone().unwrap(), true, engine).unwrap();
        let mut queue = read_only.open_queue(8).unwrap();
        for operation in [Operation::Write, Operation::WriteZeroes { may_unmap: true }, Operation::Discard] {
            assert_eq!(run(queue.as_mut(), request(operation, 0, 512, &buffers)), Err(libc::EROFS));
        }
        assert_eq!(run(queue.as_mut(), request(Operation::Flush, 0, 0, &[])), Ok(()));
        assert_eq!(run(queue.as_mut(), request(Operation::Read, 0, 0, &buffers)), Ok(()));
    }
}

#[test]
fn a_truncated_backing_file_fails_the_read_and_nothing_else() {
    for engine in engines() {
        let file = file_of(MIB);
        let mut queue = volume(&file, engine).open_queue(8).unwrap();
        file.set_len(4096).unwrap();
        let mut buffer = vec![0u8; 8192];
        assert_eq!(run(queue.as_mut(), request(Operation::Read, 0, 0, &[iovec(&mut buffer)])), Err(libc::EIO));
        assert_eq!(run(queue.as_mut(), request(Operation::Read, 0, 0, &[iovec(&mut buffer[..4096])])), Ok(()));
    }
}

#[test]
fn a_full_queue_says_so_and_recovers() {
    for engine in engines() {
        let file = file_of(MIB);
        let mut queue = volume(&file, engine).open_queue(4).unwrap();
        let mut buffer = vec![9u8; 512];
        let buffers = [iovec(&mut buffer)];
        for index in 0..4 {
            // SAFETY: the buffer lives until the queue is dropped.
            unsafe { queue.submit(request(Operation::Write, index * 512, 0, &buffers)).unwrap() };
        }
        // SAFETY: as above.
        let full = unsafe { queue.submit(request(Operation::Write, 4096, 0, &buffers)) };
        assert!(matches!(full, Err(BlockError::QueueFull { capacity: 4 })));
        assert_eq!(wait_for(queue.as_mut(), 4).len(), 4);
        assert_eq!(run(queue.as_mut(), request(Operation::Write, 4096, 0, &buffers)), Ok(()));
    }
}

#[test]
fn dropping_the_queue_waits_for_its_writes() {
    for engine in engines() {
        let file = file_of(64 * MIB);
        let mut buffer = vec![3u8; MIB as usize];
        let mut queue = volume(&file, engine).open_queue(64).unwrap();
        for index in 0..64 {
            // SAFETY: the buffer outlives the queue.
            unsafe { queue.submit(request(Operation::Write, index * MIB, 0, &[iovec(&mut buffer)])).unwrap() };
        }
        queue.kick().unwrap();
        drop(queue);
        drop(buffer);
    }
}

#[test]
fn a_volume_needs_a_file_of_a_sector() {
    assert!(matches!(RawFile::new(file_of(100), false, Engine::Auto), Err(BlockError::TooSmall { bytes: 100 })));
    let directory = File::open("/").unwrap();
    assert!(matches!(RawFile::new(directory, true, Engine::Auto), Err(BlockError::NotAFile)));
    assert!(matches!(RawFile::new(File::open("/dev/null").unwrap(), true, Engine::Auto), Err(BlockError::NotAFile)));
}

#[test]
fn a_failed_sync_is_final() {
    for engine in engines() {
        let file = file_of(MIB);
        let volume = volume(&file, engine);
        volume.shared.note_sync_failure();
        let mut queue = volume.open_queue(4).unwrap();
        let mut buffer = vec![0u8; 512];
        assert_eq!(run(queue.as_mut(), request(Operation::Flush, 0, 0, &[])), Err(libc::EIO));
        assert_eq!(run(queue.as_mut(), request(Operation::Write, 0, 0, &[iovec(&mut buffer)])), Err(libc::EIO));
        assert_eq!(run(queue.as_mut(), request(Operation::Read, 0, 0, &[iovec(&mut buffer)])), Ok(()));
        assert!(volume.sync().is_err());
    }
}

/// What the kernel may answer to one call.
#[derive(Clone, Debug)]
enum Answer {
    Part(u16),
    Interrupted,
    Unsupported,
}

fn answers() -> impl Strategy<Value = Vec<Answer>> {
    let answer = prop_oneof![
        6 => (1u16..3000).prop_map(Answer::Part),
        1 => Just(Answer::Interrupted),
        1 => Just(Answer::Unsupported),
    ];
    prop::collection::vec(answer, 0..40)
}

proptest! {
    /// However short the kernel cuts its answers, every byte is moved once, in order, and zeroing ends in zeros.
    #[test]
    fn short_transfers_are_completed(
        lengths in prop::collection::vec(1usize..4000, 1..12),
        answers in answers(),
        zeroing in any::<bool>(),
    ) {
        let total: usize = lengths.iter().sum();
        let mut memory: Vec<u8> = (0..total).map(|index| (index % 251) as u8 + 1).collect();
        let mut rest = memory.as_mut_slice();
        let mut buffers = Vec::new();
        for length in &lengths {
            let (head, tail) = rest.split_at_mut(*length);
            buffers.push(iovec(head));
            rest = tail;
        }
        let operation = if zeroing { Operation::WriteZeroes { may_unmap: false } } else { Operation::Write };
        let mut disk = vec![0xffu8; total + 512];
        let mut task = Task::idle();
        task.start(&Request { operation, offset: 512, length: total as u64, buffers: &buffers, token: 1 }, 1 << 30).unwrap();
        let mut answers = answers.into_iter();
        loop {
            let answer = answers.next().unwrap_or(Answer::Part(u16::MAX));
            let result = match (task.call().unwrap(), answer) {
                (_, Answer::Interrupted) => Err(libc::EINTR),
                (Call::Fallocate { .. }, Answer::Unsupported) => Err(libc::EOPNOTSUPP),
                (Call::Fallocate { offset, length, .. }, _) => {
                    disk[offset as usize..(offset + length) as usize].fill(0);
                    Ok(0)
                }
                (Call::Writev { iovecs, offset }, answer) => {
                    let limit = if let Answer::Part(bytes) = answer { bytes as usize } else { 1 };
                    let mut at = offset as usize;
                    let mut moved = 0;
                    for vector in iovecs {
                        let length = vector.iov_len.min(limit - moved);
                        // SAFETY: points into `memory` or the zero page.
                        let bytes = unsafe { std::slice::from_raw_parts(vector.iov_base.cast::<u8>(), length) };
                        disk[at..at + length].copy_from_slice(bytes);
                        at += length;
                        moved += length;
                    }
                    Ok(moved as u64)
                }
                (call, _) => panic!("unexpected {call:?}"),
            };
            match task.advance(result) {
                Verdict::Done(result) => break result.unwrap(),
                Verdict::Again => {}
            }
        }
        let expected = if zeroing { vec![0; total] } else { memory.clone() };
        prop_assert_eq!(&disk[512..], &expected[..]);
        prop_assert!(disk[..512].iter().all(|byte| *byte == 0xff));
    }

    /// Random batches leave both engines' files like a plain array.
    #[test]
    fn engines_agree_with_a_model(
        steps in prop::collection::vec((0u8..4, 0u64..60, 1u64..5, any::<u8>()), 1..40),
    ) {
        for engine in engines() {
            let file = file_of(64 * 512);
            let mut model = vec![0u8; 64 * 512];
            let mut queue = volume(&file, engine).open_queue(16).unwrap();
            for (kind, sector, sectors, fill) in &steps {
                let range = (*sector * 512) as usize..((sector + sectors) * 512).min(64 * 512) as usize;
                let length = range.len() as u64;
                let mut buffer = vec![*fill; range.len()];
                let buffers = [iovec(&mut buffer)];
                match kind {
                    0 => {
                        run(queue.as_mut(), request(Operation::Write, sector * 512, 0, &buffers)).unwrap();
                        model[range].fill(*fill);
                    }
                    1 => {
                        run(queue.as_mut(), request(Operation::Read, sector * 512, 0, &buffers)).unwrap();
                        prop_assert_eq!(&buffer[..], &model[range]);
                    }
                    2 => {
                        let operation = Operation::WriteZeroes { may_unmap: fill % 2 == 0 };
                        run(queue.as_mut(), request(operation, sector * 512, length, &[])).unwrap();
                        model[range].fill(0);
                    }
                    _ => run(queue.as_mut(), request(Operation::Flush, 0, 0, &[])).unwrap(),
                }
            }
            let mut stored = vec![0u8; model.len()];
            file.read_exact_at(&mut stored, 0).unwrap();
            prop_assert_eq!(&stored, &model);
        }
    }
}
