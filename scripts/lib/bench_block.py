"""Prints what the volume engine's benchmark measured, one line of JSON on stdin, as tables."""

import argparse
import json
import sys

IO_URING = {
    "random_read_qd32": "random read, 32 in flight",
    "random_read_qd1": "random read, one at a time",
    "random_write_qd32": "random write, 32 in flight",
    "random_write_qd1": "random write, one at a time",
    "synced_overwrite": "overwrite, each synced",
    "first_write_qd32": "first write over a base, against overwrite",
    "first_write_qd32_against_hole": "first write over a base, against a hole",
    "synced_first_write": "first write over a base, each synced, against overwrite",
    "synced_first_write_against_hole": "first write over a base, each synced, against a hole",
    "encrypted_random_read_qd32": "encrypted random read, 32 in flight, against plain",
    "encrypted_random_write_qd32": "encrypted random write, 32 in flight, against plain",
}
QCOW2 = {
    "nbd_random_read_qd32": "random read, 32 in flight",
    "nbd_random_read_qd1": "random read, one at a time",
    "nbd_random_write_qd32": "random write, 32 in flight",
    "nbd_random_write_qd1": "random write, one at a time",
    "nbd_synced_overwrite": "overwrite, each synced",
    "nbd_first_write_qd32": "first write over a base, 32 in flight",
    "nbd_synced_first_write": "first write over a base, each synced",
}


def table(figures, names, other):
    print(f"{'4 KiB operations per second, medians':56} {other:>9} {'engine':>9} {'ratio':>6}")
    for key, name in names.items():
        row = figures[key]
        print(f"{name:56} {row['other_per_s']:9.0f} {row['engine_per_s']:9.0f} {row['ratio']:6.2f}")


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench block", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    figures = json.load(sys.stdin)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
    table(figures, IO_URING, "io_uring")
    print("\nOver NBD on a Unix socket, the same client; qcow2 over a raw base in qemu-storage-daemon:")
    table(figures, QCOW2, "qcow2")
    print()
    for size in ("4_gib", "1_tib"):
        taken = f"{figures[f'clone_{size}_ms']:.1f} ms and {figures[f'clone_{size}_kib']} KiB"
        print(f"a volume of {size.replace('_', ' ').upper().replace('IB', 'iB')} made from a snapshot: {taken}")


if __name__ == "__main__":
    main()
