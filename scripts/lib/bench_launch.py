"""Prints what the launch benchmark measured, one line of JSON on stdin, as tables."""

import argparse
import json
import statistics
import sys

CHUNK_BYTES = 512 << 10
CASES = {
    "local": "all of the image on the host",
    "prefetched": "nothing, with a prefetch list",
    "cold": "nothing, without one",
}


def summary(image):
    """Medians, and medians of the rounds' ratios to the local launch."""
    rounds = image["rounds"]
    found = {}
    for case in CASES:
        middle = {key: statistics.median(r[case][key] for r in rounds) for key in ("ready_s", "running_s", "chunks", "bytes")}
        ratio = statistics.median(r[case]["ready_s"] / r["local"]["ready_s"] for r in rounds)
        found[case] = {**middle, "ratio": ratio, "part": middle["chunks"] / image["nonzero_chunks"],
                       "part_of_image": middle["chunks"] * CHUNK_BYTES / image["bytes"]}
    return found


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench launch", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    images = json.load(sys.stdin)["images"]
    for image in images:
        image["medians"] = summary(image)
        print(f"{image['name']}: {image['bytes'] // CHUNK_BYTES} chunks, of them {image['nonzero_chunks']} not zeros, "
              f"{len(image['rounds'])} rounds")
        print(f"{'what was on the host before':32} {'ready s':>8} {'ratio':>6} {'running s':>10} {'chunks':>7} {'of image':>8} "
              f"{'of data':>8} {'MiB':>7}")
        for case, name in CASES.items():
            row = image["medians"][case]
            print(f"{name:32} {row['ready_s']:8.1f} {row['ratio']:6.2f} {row['running_s']:10.1f} {row['chunks']:7.0f} "
                  f"{row['part_of_image']:8.1%} {row['part']:8.1%} {row['bytes'] / 2**20:7.1f}")
        print()
    print("medians; ratio = time to ready / that of the launch with all of the image on the host, in the same round")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(images, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
