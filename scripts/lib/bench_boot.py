"""Boots the same kernel and initrd in several VMMs and compares them. Called by scripts/bench.

Only ratios within one run mean anything: VMMs take turns, so that drift of the machine hits all alike.
"""

import argparse
import json
import os
import pathlib
import select
import statistics
import subprocess
import sys
import time

import bench_guest

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc none /proc
read up rest < /proc/uptime
echo "BENCH-INIT $up"
line=$(/bin/busybox cat /proc/cmdline)
case "$line" in *bench.hold*) /bin/busybox sleep 3 ;; esac
case "$line" in *bench.off*) /bin/busybox poweroff -f ;; esac
/bin/busybox reboot -f
"""


def prepare(work):
    """The stock kernel's vmlinux, an initrd and an empty disk."""
    work.mkdir(parents=True, exist_ok=True)
    bench_guest.extract_vmlinux(work / "vmlinux")
    tree = work / "initrd-tree"
    bench_guest.make_folders(tree, ("bin", "proc"))
    (tree / "bin/busybox").write_bytes(pathlib.Path("/bin/busybox").read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    bench_guest.pack_initrd(tree, work / "initrd")
    with open(work / "disk.raw", "wb") as disk:
        disk.truncate(256 << 20)


def hearth(options, work, cmdline):
    return [options.vmm, "run", "--kernel", f"{work}/vmlinux", "--initrd", f"{work}/initrd", "--cmdline", cmdline,
            "--disk", f"{work}/disk.raw", "--memory", str(options.memory), "--cpus", str(options.cpus)]


def qemu(options, work, cmdline):
    return ["qemu-system-x86_64", "-M", "microvm,pit=off,pic=off,rtc=off", "-accel", "kvm", "-cpu", "host",
            "-m", str(options.memory), "-smp", str(options.cpus), "-kernel", f"{work}/vmlinux",
            "-initrd", f"{work}/initrd", "-append", cmdline, "-nodefaults", "-no-user-config", "-nographic",
            "-serial", "stdio", "-no-reboot", "-drive", f"id=d,file={work}/disk.raw,format=raw,if=none",
            "-device", "virtio-blk-device,drive=d"]


def firecracker(options, work, cmdline):
    config = {
        "boot-source": {"kernel_image_path": f"{work}/vmlinux", "initrd_path": f"{work}/initrd", "boot_args": cmdline},
        "drives": [{"drive_id": "d", "path_on_host": f"{work}/disk.raw", "is_root_device": False,
                    "is_read_only": False}],
        "machine-config": {"vcpu_count": options.cpus, "mem_size_mib": options.memory},
    }
    path = pathlib.Path("/tmp/bench-firecracker.json")
    path.write_text(json.dumps(config))
    return [options.firecracker, "--no-api", "--config-file", str(path)]


def cloud_hypervisor(options, work, cmdline):
    return [options.cloud_hypervisor, "--kernel", f"{work}/vmlinux", "--initramfs", f"{work}/initrd", "--cmdline",
            cmdline, "--cpus", f"boot={options.cpus}", "--memory", f"size={options.memory}M", "--disk",
            f"path={work}/disk.raw,image_type=raw", "--serial", "tty", "--console", "off"]


def kvm_counters():
    """KVM's counters, summed over the guests that live now; one runs at a time."""
    folder = pathlib.Path("/sys/kernel/debug/kvm")
    counters = {}
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.is_file():
            try:
                counters[path.name] = int(path.read_text())
            except (ValueError, OSError):
                pass
    return counters


def memory_beside_guest(pid, guest_mib):
    """PSS and private dirty KiB of all mappings but the guest's memory: the neighbouring mappings that together make
    up at least half of it."""
    areas = []
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(x, 16) for x in head.split("-"))
            areas.append({"start": start, "end": end, "Pss": 0, "Private_Dirty": 0})
        elif head in ("Pss:", "Private_Dirty:"):
            areas[-1][head[:-1]] = int(line.split()[1])
    clusters = []
    for area in areas:
        if clusters and clusters[-1][-1]["end"] == area["start"]:
            clusters[-1].append(area)
        else:
            clusters.append([area])
    beside = []
    for cluster in clusters:
        large = [a for a in cluster if a["end"] - a["start"] >= 1 << 20]
        if sum(a["end"] - a["start"] for a in large) < guest_mib << 19:
            beside += cluster
    return sum(a["Pss"] for a in beside), sum(a["Private_Dirty"] for a in beside)


def boot(command, hold, guest_mib, timeout=120):
    """One boot: wall seconds to guest init and to exit, guest uptime; when held, KVM's counters at init and memory."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, result = b"", {}
    while True:
        if time.monotonic() - started > timeout:
            process.kill()
            raise RuntimeError(f"{command[0]}: no end after {timeout} s; output ends:\n{output[-2000:].decode(errors='replace')}")
        if not select.select([process.stdout], [], [], 1)[0]:
            continue
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            break
        output += chunk
        if "init" not in result and b"BENCH-INIT " in output and b"\n" in output[output.index(b"BENCH-INIT "):]:
            result["init"] = time.monotonic() - started
            result["uptime"] = float(output.split(b"BENCH-INIT ")[1].split()[0])
            if hold:
                result["kvm"] = {name: count for name, count in kvm_counters().items() if count}
                time.sleep(1)
                result["pss"], result["dirty"] = memory_beside_guest(process.pid, guest_mib)
    process.wait()
    result["exit"] = time.monotonic() - started
    if "init" not in result:
        raise RuntimeError(f"{command[0]} never reached init; output ends:\n{output[-2000:].decode(errors='replace')}")
    return result


def run(options, work):
    cmdline = "console=ttyS0 quiet reboot=k panic=-1"
    vmms = {"hearth-vmm": (hearth, "console=ttyS0 quiet panic=-1"), "QEMU microvm": (qemu, cmdline.replace("reboot=k", "reboot=t"))}
    if options.firecracker:
        vmms["Firecracker"] = (firecracker, cmdline)
    if options.cloud_hypervisor:
        vmms["Cloud Hypervisor"] = (cloud_hypervisor, "console=ttyS0 quiet panic=-1 bench.off")
    runs = {name: [] for name in vmms}
    memory = {}
    for turn in range(options.runs + 1):
        for name, (make, line) in vmms.items():
            # The first turn warms caches and takes the memory: the guest is held in it, so that its times do not count.
            hold = turn == 0
            result = boot(make(options, work, line + " bench.hold" * hold), hold, options.memory)
            if hold:
                memory[name] = result
            else:
                runs[name].append(result)
            print(f"\r{turn}/{options.runs} {name:<20}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    report = {}
    for name, results in runs.items():
        median = {key: statistics.median(r[key] for r in results) for key in ("init", "exit", "uptime")}
        report[name] = {**median, "kvm": memory[name]["kvm"], "pss_kib": memory[name]["pss"], "private_dirty_kib": memory[name]["dirty"],
                        "spread_init": [min(r["init"] for r in results), max(r["init"] for r in results)]}
    base = report["hearth-vmm"]
    print(f"{'VMM':<18}{'to init s':>10}{'ratio':>7}{'to exit s':>11}{'ratio':>7}{'uptime s':>10}{'exits':>9}"
          f"{'io':>8}{'mmio':>8}{'PSS KiB':>9}{'dirty KiB':>11}")
    for name, r in report.items():
        kvm = r["kvm"]
        print(f"{name:<18}{r['init']:>10.2f}{r['init'] / base['init']:>7.2f}{r['exit']:>11.2f}"
              f"{r['exit'] / base['exit']:>7.2f}{r['uptime']:>10.2f}{kvm.get('exits', 0):>9.0f}"
              f"{kvm.get('io_exits', 0):>8.0f}{kvm.get('mmio_exits', 0):>8.0f}{r['pss_kib']:>9.0f}"
              f"{r['private_dirty_kib']:>11.0f}")
    print(f"medians of {options.runs} runs each, taking turns; ratio = that VMM / hearth-vmm; "
          f"{options.cpus} vCPU, {options.memory} MiB; PSS and private dirty beside the guest's memory")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["prepare", "run"])
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--vmm")
    parser.add_argument("--firecracker")
    parser.add_argument("--cloud-hypervisor")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.action == "prepare":
        prepare(options.work)
    else:
        run(options, options.work)


main()
