"""Prepares the guest of scripts/bench storage, and prints what was measured, one line of JSON on stdin, as tables."""

import argparse
import json
import pathlib
import shutil
import sys

import bench_guest

LOADS = {
    "random_read_qd1": "random read, one at a time",
    "random_read_qd32": "random read, 32 in flight",
    "random_write_qd1": "random write, one at a time",
    "random_write_qd32": "random write, 32 in flight",
    "synced_write_qd1": "synced write, one at a time",
}


def prepare(work, program):
    """The stock kernel, and an initrd that is the benchmark's program and the drivers of the disk."""
    work.mkdir(parents=True, exist_ok=True)
    bench_guest.extract_vmlinux(work / "vmlinux")
    tree = work / "initrd-tree"
    bench_guest.make_folders(tree, ("proc", "sys", "modules"))
    bench_guest.unpack_modules(("virtio_pci", "virtio_mmio", "virtio_blk"), tree / "modules")
    for to in (tree / "init", work / "guest_load"):
        shutil.copy(program, to)
        to.chmod(0o755)
    bench_guest.pack_initrd(tree, work / "initrd")


def hotplug(figures):
    print(f"{'a disk of a running guest, medians':44} {'hearth-vmm ms':>13} {'QEMU q35 ms':>12} {'ratio':>6}")
    names = {"attach": "command until the guest has it", "detach": "command until its file is free"}
    for key, name in names.items():
        row = figures[key]
        print(f"{name:44} {row['hearth_ms']:13.0f} {row['qemu_ms']:12.0f} {row['ratio']:6.2f}")
    print("ratio = QEMU / hearth-vmm, median of the rounds'\n")


def io(figures):
    print(f"{'4 KiB in the guest, medians':28} {'':18} {'per s':>9} {'answered':>9} {'p99 us':>8} {'exits each':>11} {'ratio':>6} "
          f"{'answered':>9} {'cached':>6}")
    for key, name in LOADS.items():
        for vmm, row in figures[key].items():
            print(f"{name:28} {vmm:18} {row['per_s']:9.0f} {row['accepted_per_s']:9.0f} {row['p99_us']:8.0f} {row['exits']:11.2f} "
                  f"{row['hearth_ratio']:6.2f} {row['accepted_ratio']:9.2f} {row['cached_ratio']:6.2f}")
            name = ""
    print("per s: until all of it is durable, by one flush at the end; answered: until the guest has its answers, from whatever cache\n"
          "ratio = operations per second of hearth-vmm, with direct I/O as agents use it / those of that VMM, median of the rounds';\n"
          "cached = the same of hearth-vmm through the page cache, which is what Firecracker does\n"
          "no VMM: the same program on the host; direct as many in flight, cached one after the other by system calls\n")


def cloud(figures):
    call, snapshot = figures["attach_call"], figures["snapshot"]
    print(f"`hearth volume attach` until the guest has the disk: {call['ms']:.0f} ms; a call that changes nothing: "
          f"{call['call_ms']:.0f} ms")
    print(f"snapshot under a writing guest: writes held {snapshot['held_ms']:.1f} ms (at most {snapshot['held_ms_max']:.1f})")
    print(f"  p99 of writes {snapshot['p99_us_during']:.0f} us during the upload, {snapshot['p99_us']:.0f} us without: "
          f"ratio {snapshot['p99_ratio']:.2f} (p50: {snapshot['p50_ratio']:.2f}); longest {snapshot['max_us_during']:.0f} us")
    print(f"  {snapshot['uploaded_chunks']:.0f} chunks uploaded ({snapshot['uploaded_bytes'] / 2**20:.1f} MiB) of "
          f"{snapshot['frozen_chunks']:.0f} that had changed")


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench storage", description=__doc__)
    parser.add_argument("--prepare", metavar="FOLDER", type=pathlib.Path)
    parser.add_argument("--program", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.program)
        return
    figures = json.load(sys.stdin)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for key, show in (("hotplug", hotplug), ("io", io), ("cloud", cloud)):
        if key in figures:
            show(figures[key])


if __name__ == "__main__":
    main()
