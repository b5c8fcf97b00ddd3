"""Prints what the volume engine's benchmark measured, one line of JSON on stdin, as a table."""

import argparse
import json
import sys

NAMES = {
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


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench block", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    figures = json.load(sys.stdin)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
    print(f"{'4 KiB operations per second, medians':56} {'io_uring':>9} {'engine':>9} {'ratio':>6}")
    for key, name in NAMES.items():
        row = figures[key]
        print(f"{name:56} {row['raw_per_s']:9.0f} {row['engine_per_s']:9.0f} {row['ratio']:6.2f}")
    print(f"a volume of 4 GiB made from a snapshot: {figures['clone_4_gib_ms']:.2f} ms; of 1 TiB: {figures['clone_1_tib_ms']:.0f} ms")


if __name__ == "__main__":
    main()
