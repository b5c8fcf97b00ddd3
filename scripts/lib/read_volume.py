#!/usr/bin/env python3
"""Reads a volume that is not encrypted from its files, by docs/storage.md alone, and writes its content.

usage: read_volume.py MAP DATA OUTPUT [BASE PRESENCE]

A second reader of the format, beside the engine: its tests show that the documentation is enough to write one. It changes nothing, takes
no lock, and refuses what is damaged.
"""

import struct
import sys

SECTOR, BLOCK, CHUNK = 512, 4096, 512 << 10
LOG, LOG_BYTES, PAGES = 8192, 1 << 20, 1056768
CHUNKS_PER_SECTOR, SECTORS_PER_PAGE = 31, 8
BLOCKS_PER_CHUNK = CHUNK // BLOCK
CHUNKS_PER_PAGE = CHUNKS_PER_SECTOR * SECTORS_PER_PAGE

TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def refuse(why):
    sys.exit(f"read_volume: {why}")


def at(file, offset, length):
    file.seek(offset)
    return file.read(length).ljust(length, b"\0")


class Header:
    def __init__(self, copy):
        (self.version, self.flags, self.sequence, self.id, self.size, self.generation, self.root, self.extent_chunks,
         self.extent_crc) = struct.unpack_from("<IIQ32sQQ32sQI", copy, 8)
        self.clean, self.has_base = bool(self.flags & 1), bool(self.flags & 2)


def read_header(file):
    found = []
    for number in range(2):
        copy = at(file, number * 4096, 4096)
        if copy[:8] == b"HRTHMAP1" and struct.unpack_from("<I", copy, 4092)[0] == crc32c(copy[:4092]):
            found.append(Header(copy))
    if not found:
        refuse("no copy of the header is whole")
    header = max(found, key=lambda header: header.sequence)
    if header.version != 2 or header.flags > 3 or header.size % BLOCK or not 0 < header.size <= 1 << 46:
        refuse("the header makes no sense")
    return header


def read_extent(header, presence):
    """Bits of the chunks that the base has, as one number."""
    if not header.has_base:
        return 0
    words = presence[len(presence) // 16 * 8:len(presence) // 16 * 16]
    extent = int.from_bytes(words, "little") & (1 << header.extent_chunks) - 1
    used = extent.to_bytes((extent.bit_length() + 63) // 64 * 8, "little")
    if crc32c(used) != header.extent_crc:
        refuse("the base is not the one that the volume was made from")
    return extent


class Sector:
    """One sector of a page, of the newer slot."""

    def __init__(self, seq, local):
        self.seq, self.local = seq, local


def read_sectors(file, header, extent):
    """All sectors, of all pages one after the other."""
    sectors = []
    chunks = -(-header.size // CHUNK)
    for page in range(-(-chunks // CHUNKS_PER_PAGE)):
        slots = [at(file, PAGES + 8192 * page + 4096 * slot, 4096) for slot in range(2)]
        if any(slots[1]) and not any(slots[0]):
            refuse(f"slot A of page {page} is gone")
        newest = []
        for number in range(SECTORS_PER_PAGE):
            first = page * CHUNKS_PER_PAGE + number * CHUNKS_PER_SECTOR
            local = 0
            for chunk in range(CHUNKS_PER_SECTOR):
                if not extent >> first + chunk & 1:
                    local |= (1 << BLOCKS_PER_CHUNK) - 1 << chunk * BLOCKS_PER_CHUNK
            best = Sector(0, local)
            tag = crc32c(header.id + struct.pack("<QQ", page, number))
            for slot in slots:
                sector = slot[number * SECTOR:(number + 1) * SECTOR]
                if not any(sector):
                    continue
                crc, seq, theirs, _dirty = struct.unpack_from("<IIII", sector)
                if crc != crc32c(sector[4:]) or theirs != tag or not 1 <= seq <= 1 << 31:
                    refuse(f"sector {number} of page {page} is damaged")
                if seq > best.seq:
                    best = Sector(seq, int.from_bytes(sector[16:], "little"))
            newest.append(best)
        if header.clean and len({sector.seq for sector in newest}) > 1:
            refuse(f"page {page} was written in part")
        sectors += newest
    return sectors


def bit_of(sectors, block):
    """The sector of a block's LOCAL bit, and which bit of it that is."""
    chunk = block // BLOCKS_PER_CHUNK
    return sectors[chunk // CHUNKS_PER_SECTOR], block % (CHUNKS_PER_SECTOR * BLOCKS_PER_CHUNK)


def record_head(header, log, place):
    """Sequence and entries of the record at this block of the log, if there is one."""
    head = log[place * BLOCK:(place + 1) * BLOCK]
    if len(head) < BLOCK or head[:8] != b"HRTHLOG1":
        return None
    crc, count, seq, tag = struct.unpack_from("<IIQI", head, 8)
    if crc != crc32c(head[12:]) or tag != crc32c(header.id + struct.pack("<Q", place)) or not 1 <= count <= 16:
        return None
    return seq, [struct.unpack_from("<QII", head, 32 + 16 * number) for number in range(count)]


def read_log(file, header, sectors):
    """Content of blocks that only the log is sure to have."""
    log = at(file, LOG, LOG_BYTES)

    def counts(entry):
        return entry[0] < header.size // BLOCK and bit_of(sectors, entry[0])[0].seq <= entry[1]

    kept, place, expected = {}, 0, None
    while True:
        head = record_head(header, log, place)
        if head is None or expected not in (None, head[0]):
            break
        seq, entries = head
        contents = [log[(place + 1 + number) * BLOCK:(place + 2 + number) * BLOCK] for number in range(len(entries))]
        if any(crc32c(content) != entry[2] for entry, content in zip(entries, contents)):
            break
        kept.update((entry[0], content) for entry, content in zip(entries, contents) if counts(entry))
        place, expected = place + 1 + len(entries), seq + 1 & (1 << 64) - 1
    for later in range(place + 1, LOG_BYTES // BLOCK):
        head = record_head(header, log, later)
        if head is not None and any(map(counts, head[1])):
            refuse("the log is damaged before a record that counts")
    return kept


def main():
    if len(sys.argv) not in (4, 6):
        sys.exit(__doc__)
    map_path, data_path, output_path, *base_paths = sys.argv[1:]
    with open(map_path, "rb") as map_file, open(data_path, "rb") as data, open(output_path, "wb") as output:
        header = read_header(map_file)
        if header.has_base and not base_paths:
            refuse("the volume has a base")
        base = presence = None
        if header.has_base:
            base = open(base_paths[0], "rb")
            with open(base_paths[1], "rb") as file:
                presence = file.read()
        extent = read_extent(header, presence)
        sectors = read_sectors(map_file, header, extent)
        kept = {} if header.clean else read_log(map_file, header, sectors)
        for block in range(header.size // BLOCK):
            sector, bit = bit_of(sectors, block)
            chunk = block // BLOCKS_PER_CHUNK
            if block in kept:
                content = kept[block]
            elif sector.local >> bit & 1:
                content = at(data, block * BLOCK, BLOCK)
            elif presence[chunk // 8] >> chunk % 8 & 1:
                content = at(base, block * BLOCK, BLOCK)
            else:
                refuse(f"chunk {chunk} of the base is not here yet")
            output.write(content)


main()
