//! A disk on its way to a guest and back: from the command to the VMM until the guest has the disk, and from the command until what is
//! behind the disk is free again.

use std::fs::File;
use std::time::Instant;

use hearth_tests::console::PATIENCE;
use hearth_vmm::control::protocol::{Command, Event, Outcome};
use serde_json::{Value, json};

use crate::guests::{Guest, Server, Setting, Volume};
use crate::median;

const BYTES: u64 = 1 << 30;

/// Milliseconds for attaching and detaching, once.
fn once(guest: &mut Guest, setting: &Setting, number: u32) -> (f64, f64) {
    let path = setting.path(&format!("plugged-{}.data", guest.name.len()));
    File::create(&path).unwrap().set_len(BYTES).unwrap();
    let ms = |began: Instant| began.elapsed().as_secs_f64() * 1e3;
    match &mut guest.server {
        Server::Hearth(vmm) => {
            let volume = Volume::new(path, number, BYTES, true);
            let began = Instant::now();
            volume.attach(vmm);
            guest.console.wait_for("BENCH-DISK add vdb");
            let attached = ms(began);
            let began = Instant::now();
            let detach = Command::DetachDisk { serial: volume.serial(), force: false };
            assert_eq!(vmm.call(detach), Outcome::Done);
            let gone = vmm.client.next_event(PATIENCE).unwrap();
            assert_eq!(gone, Some(Event::DiskDetached { serial: volume.serial(), durable: true }));
            let detached = ms(began);
            guest.console.wait_for("BENCH-DISK remove vdb");
            (attached, detached)
        }
        Server::Qemu(_, qmp) => {
            let file = json!({
                "driver": "file", "filename": path, "node-name": "plugged",
                "aio": "io_uring", "cache": { "direct": true },
            });
            let device = json!({ "driver": "virtio-blk-pci", "drive": "plugged", "bus": "rp0", "id": "plugged" });
            let began = Instant::now();
            qmp.call("blockdev-add", file);
            qmp.call("device_add", device);
            guest.console.wait_for("BENCH-DISK add vdb");
            let attached = ms(began);
            let began = Instant::now();
            qmp.call("device_del", json!({ "id": "plugged" }));
            qmp.wait_for("DEVICE_DELETED");
            qmp.call("blockdev-del", json!({ "node-name": "plugged" }));
            let detached = ms(began);
            guest.console.wait_for("BENCH-DISK remove vdb");
            (attached, detached)
        }
        Server::Firecracker(_) => unreachable!("it has no hot-plug"),
    }
}

/// Rounds on hearth-vmm and QEMU that take turns.
pub fn run(guests: &mut [Guest], setting: &Setting, rounds: usize) -> Value {
    let mut figures: [Vec<(f64, f64)>; 2] = Default::default();
    for round in 0..rounds {
        for guest in guests.iter_mut() {
            let which = match guest.server {
                Server::Hearth(_) => 0,
                Server::Qemu(..) => 1,
                Server::Firecracker(_) => continue,
            };
            let (attached, detached) = once(guest, setting, round as u32 + 1);
            eprintln!("{}/{rounds} {}: attached {attached:.0} ms, detached {detached:.0} ms", round + 1, guest.name);
            figures[which].push((attached, detached));
        }
    }
    let [hearth, qemu] = figures;
    let both = |part: fn(&(f64, f64)) -> f64| {
        json!({
            "hearth_ms": median(hearth.iter().map(part)),
            "qemu_ms": median(qemu.iter().map(part)),
            "ratio": median(qemu.iter().zip(&hearth).map(|(other, own)| part(other) / part(own))),
        })
    };
    json!({ "attach": both(|pair| pair.0), "detach": both(|pair| pair.1) })
}
