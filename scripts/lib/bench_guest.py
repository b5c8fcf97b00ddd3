"""What the benchmarks' guests are made of: the stock kernel's vmlinux, its modules, an initrd."""

import gzip
import lzma
import os
import pathlib
import subprocess
import sys


def kernel():
    """The newest stock Debian cloud kernel of this machine."""
    images = sorted(pathlib.Path("/boot").glob("vmlinuz-*-cloud-amd64"), key=lambda p: os.stat(p).st_mtime)
    if not images:
        sys.exit("bench: no /boot/vmlinuz-*-cloud-amd64: install linux-image-cloud-amd64")
    return images[-1]


def extract_vmlinux(to):
    """Puts the kernel without its packing into a file."""
    image = kernel().read_bytes()
    magics = {b"\x02\x21\x4c\x18": ["lz4", "-dc"], b"\x1f\x8b\x08": ["gzip", "-dc"], b"\xfd7zXZ": ["xz", "-dc"],
              b"\x28\xb5\x2f\xfd": ["zstd", "-dc"]}
    for magic, command in magics.items():
        at = image.find(magic)
        while at >= 0:
            out = subprocess.run(command, input=image[at:], capture_output=True, check=False).stdout
            if out[:4] == b"\x7fELF":
                to.write_bytes(out)
                return
            at = image.find(magic, at + 1)
    sys.exit(f"bench: no vmlinux found inside {kernel()}")


def unpack_modules(names, folder):
    """Puts modules and what they need into a folder, in the order in which they are to be loaded."""
    version = kernel().name.removeprefix("vmlinuz-")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    done = []
    for name in names:
        asked = ["modprobe", "-S", version, "--show-depends", name]
        lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        for path in (pathlib.Path(line.split()[1]) for line in lines if line.startswith("insmod ")):
            if path not in done:
                done.append(path)
                content = path.read_bytes()
                if path.suffix == ".xz":
                    content = lzma.decompress(content)
                (folder / f"{len(done):02}-{path.name.split('.')[0]}.ko").write_bytes(content)


def make_folders(tree, names):
    """The folders of an initrd, with the console's device."""
    for name in (*names, "dev"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    if not (tree / "dev/console").exists():
        os.mknod(tree / "dev/console", 0o600 | 0o020000, os.makedev(5, 1))


def pack_initrd(tree, to):
    """Packs a folder."""
    names = sorted(str(p.relative_to(tree)) for p in tree.rglob("*"))
    archive = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input="\n".join(names).encode(),
                             capture_output=True, check=True).stdout
    to.write_bytes(gzip.compress(archive, 1, mtime=0))
