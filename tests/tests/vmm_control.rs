//! hearth-vmm as its agent sees it: the control socket, the console socket and ring, events, exit codes, confinement, cost.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;

use hearth_tests::console::PATIENCE;
use hearth_tests::vmm::Vmm;
use hearth_vmm::console_ring;
use hearth_vmm::control::client::{Client, ClientError};
use hearth_vmm::control::protocol::{Command, Event, MachineState, Outcome, Stats, exit};
use hearth_vmm::memory_use;

fn sum(stats: &Stats, name: &str) -> u64 {
    stats.exits.iter().find(|(n, _)| n == name).map_or(0, |(_, count)| *count)
}

#[test]
fn an_agent_pauses_resumes_counts_leaves_comes_back_and_presses_the_button() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();

    assert_eq!(vmm.call(Command::Pause), Outcome::Done);
    let before = vmm.stats();
    console.send("echo still-\"here\"");
    let after = vmm.stats();
    assert_eq!(sum(&before, "kvm_exits"), sum(&after, "kvm_exits"), "a paused guest runs");
    assert!(sum(&after, "io_out") > 0 && after.start_ns > 0 && after.disks[0].read_ops > 0, "{after:?}");
    assert!(matches!(vmm.client.call(Command::Pause, &[], PATIENCE), Err(ClientError::Refused(_))));
    assert_eq!(vmm.call(Command::Resume), Outcome::Done);
    console.wait_for("still-here");

    // A second agent takes over, and the first one's connection ends.
    let (client, peer) = Client::connect(&vmm.path("control"), PATIENCE).unwrap();
    assert_eq!((peer.instance_id.as_str(), peer.state), ("i-0123456789abcdef0", MachineState::Running));
    let mut old = std::mem::replace(&mut vmm.client, client);
    assert!(old.call(Command::Stats, &[], PATIENCE).is_err());

    // A late console client gets the backlog.
    vmm.console().wait_for("HEARTH-GUEST ready");

    assert_eq!(vmm.call(Command::PowerButton), Outcome::Done);
    assert_eq!(vmm.event(), Event::PoweredOff);
    assert_eq!(vmm.exit_code(), exit::POWER_OFF);
    let ring = File::open(vmm.path("ring")).unwrap();
    let kept = String::from_utf8_lossy(&console_ring::read(&ring, 0).unwrap().bytes).into_owned();
    assert!(kept.contains("still-here") && kept.contains("Power down"), "{kept}");
}

#[test]
fn every_thread_is_confined_and_the_process_is_cheap() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    console.run("dd if=/dev/vda of=/dev/null bs=1M count=20 2>/dev/null; dd if=/dev/hwrng of=/dev/null bs=1k count=1");
    let tasks = format!("/proc/{}/task", vmm.child.id());
    let mut threads = 0;
    for task in std::fs::read_dir(tasks).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
        // The kernel's own io_uring workers come and go.
        threads += u32::from(!status.starts_with("Name:\tiou-wrk"));
    }
    assert_eq!(threads, 4, "control, I/O and two vCPUs");
    let stats = vmm.stats();
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.child.id())).unwrap();
    let cost = memory_use::parse(&smaps, &stats.guest_ram);
    assert!(cost.guest_rss > 20 << 20, "{cost:?}");
    assert!(cost.private_dirty < 2 << 20, "{cost:?}");
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}

/// An ELF kernel for the PVH entry with this code.
fn kernel_of(code: &[u8], path: &Path) {
    let entry = 0x10_0000u32;
    let mut file = vec![0u8; 0x1000];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[18] = 62;
    file[32] = 64;
    file[54] = 56;
    file[56] = 2;
    let mut put = |at: usize, value: u64| file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    for (at, kind, offset, size) in [(64, 1, 0x1000, code.len() as u64), (120, 4, 0x800, 20)] {
        put(at, kind);
        put(at + 8, offset);
        put(at + 24, u64::from(entry));
        put(at + 32, size);
        put(at + 40, size);
    }
    put(0x800, 4 | (4 << 32));
    put(0x808, 18 | (u64::from(u32::from_le_bytes(*b"Xen\0")) << 32));
    put(0x810, u64::from(entry));
    file.extend_from_slice(code);
    std::fs::write(path, file).unwrap();
}

#[test]
fn a_panic_is_told_before_the_reset() {
    let mut vmm = Vmm::start();
    let kernel = vmm.path("kernel");
    // Bit 0 to the pvpanic port, then 1 to the ACPI reset register, then halt.
    let out = |port: u16, value: u8| [0xba, port as u8, (port >> 8) as u8, 0, 0, 0xb0, value, 0xee];
    kernel_of(&[&out(0x505, 1)[..], &out(0x602, 1), &[0xf4, 0xeb, 0xfd]].concat(), &kernel);
    vmm.boot(&kernel, None, None, "");
    assert_eq!(vmm.event(), Event::GuestPanicked);
    assert_eq!(vmm.event(), Event::Reset);
    assert_eq!(vmm.exit_code(), exit::RESET);
}

#[test]
fn a_triple_fault_is_a_crash() {
    let mut vmm = Vmm::start();
    let kernel = vmm.path("kernel");
    // An undefined instruction without an interrupt table.
    kernel_of(&[0x0f, 0x0b], &kernel);
    vmm.boot(&kernel, None, None, "");
    assert_eq!(vmm.event(), Event::GuestCrashed);
    assert_eq!(vmm.exit_code(), exit::GUEST_CRASH);
}

#[test]
fn a_guest_that_never_yields_is_paused_and_killed() {
    let mut vmm = Vmm::start();
    let kernel = vmm.path("kernel");
    // Jumps to itself.
    kernel_of(&[0xeb, 0xfe], &kernel);
    vmm.boot(&kernel, None, None, "");
    assert_eq!(vmm.call(Command::Pause), Outcome::Done);
    assert_eq!(vmm.call(Command::Resume), Outcome::Done);
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
    assert_eq!(vmm.lock.metadata().unwrap().len(), 4);
}

#[test]
fn unanswered_console_clients_do_not_hold_up_the_guest() {
    let mut vmm = Vmm::start();
    let mut console = vmm.boot_tiny();
    // Never reads; the guest must not notice.
    let lazy = UnixStream::connect(vmm.path("console")).unwrap();
    console.send("i=0; while [ $i -lt 400 ]; do echo 0123456789012345678901234567890123456789; i=$((i+1)); done");
    console.send("echo now-\"over\"");
    console.wait_for("now-over");
    assert_eq!(console.run("echo fine"), "fine");
    drop(lazy);
    assert_eq!(vmm.call(Command::Kill), Outcome::Done);
    assert_eq!(vmm.exit_code(), exit::KILLED);
}
