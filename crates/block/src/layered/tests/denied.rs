//! Hosts that forbid io_uring: the engines go on with their threads.

use std::fs::File;
use std::time::Duration;

use super::files::{Files, SIZE, all, each_key, read, run, write};
use crate::{CHUNK_BYTES, Engine, FreezeState, OfflineVolume, Operation, RawFile, Volume};

/// From now on `io_uring_setup` fails in this thread and those that it starts.
fn forbid_io_uring(errno: i32) {
    let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = [
        // The number of the system call.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_io_uring_setup as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program outlives the calls, which change this thread alone.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program),
        ]
    };
    assert_eq!(results, [0, 0], "{}", std::io::Error::last_os_error());
    let refused = io_uring::IoUring::new(2).err().unwrap();
    assert_eq!(refused.raw_os_error(), Some(errno));
}

fn life_of_a_layered_volume(keys: bool) {
    let files = Files::new(keys);
    [0, 1, 4].iter().for_each(|chunk| files.bring(*chunk));
    let refused = files.open(Engine::IoUring);
    assert!(refused.open_queue(4).is_err(), "io_uring is not forbidden");
    refused.close_clean().unwrap();
    drop(refused);
    let volume = files.open(Engine::Auto);
    let mut queue = volume.open_queue(4).unwrap();
    write(queue.as_mut(), 512, 512, 1);
    write(queue.as_mut(), 2 * CHUNK_BYTES, 65536, 2);
    run(queue.as_mut(), Operation::Discard, CHUNK_BYTES, 8192, &mut []);
    run(queue.as_mut(), Operation::Flush, 0, 0, &mut []);
    volume.freeze_prepare().unwrap();
    while volume.freeze_state() == FreezeState::Preparing {
        // The queue's thread has this to do beside its requests.
        assert!(all(&read(queue.as_mut(), 0, 512), 0xB0));
        volume.wait_prepared(Duration::from_millis(10));
    }
    let (stage, staged) = files.stage();
    let frozen = volume.freeze(stage).unwrap();
    assert_eq!(frozen.iter().collect::<Vec<_>>(), [0, 1, 2]);
    write(queue.as_mut(), 2 * CHUNK_BYTES, 4096, 3);
    assert!(staged.view().is_staged(2).unwrap() && !staged.view().is_broken().unwrap());
    volume.thaw(false);
    volume.grow(SIZE + CHUNK_BYTES).unwrap();
    write(queue.as_mut(), SIZE, 4096, 4);
    drop(queue);
    volume.close_clean().unwrap();
    drop(volume);
    assert!(OfflineVolume::open(files.files(), 3).unwrap().header().clean);
    let volume = files.open(Engine::Auto);
    let mut queue = volume.open_queue(4).unwrap();
    let expected = [(0, 0xB0), (512, 1), (1024, 0xB0), (CHUNK_BYTES, 0), (CHUNK_BYTES + 8192, 0xB1)];
    let expected = expected.into_iter().chain([(2 * CHUNK_BYTES, 3), (2 * CHUNK_BYTES + 4096, 2), (SIZE, 4)]);
    for (offset, byte) in expected {
        assert!(all(&read(queue.as_mut(), offset, 512), byte), "at {offset}");
    }
}

fn life_of_a_raw_file() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let open = |engine, file: &File| RawFile::new(file.try_clone().unwrap(), false, engine).unwrap();
    assert!(open(Engine::IoUring, &file).open_queue(4).is_err(), "io_uring is not forbidden");
    let volume = open(Engine::Auto, &file);
    let mut queue = volume.open_queue(4).unwrap();
    write(queue.as_mut(), 512, 8192, 1);
    run(queue.as_mut(), Operation::WriteZeroes { may_unmap: true }, 1024, 512, &mut []);
    volume.grow(2 << 20).unwrap();
    write(queue.as_mut(), (2 << 20) - 512, 512, 2);
    run(queue.as_mut(), Operation::Flush, 0, 0, &mut []);
    drop(queue);
    volume.sync().unwrap();
    let mut queue = open(Engine::Auto, &file).open_queue(1).unwrap();
    for (offset, byte) in [(0, 0), (512, 1), (1024, 0), (1536, 1), ((2 << 20) - 512, 2)] {
        assert!(all(&read(queue.as_mut(), offset, 512), byte), "at {offset}");
    }
}

/// As with `kernel.io_uring_disabled` or a container's seccomp filter, and as with a kernel that does not have it.
#[test]
fn engines_live_where_io_uring_is_forbidden() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        // The filter ends with the thread.
        let life = std::thread::spawn(move || {
            forbid_io_uring(errno);
            each_key(life_of_a_layered_volume);
            life_of_a_raw_file();
        });
        life.join().unwrap();
    }
}
