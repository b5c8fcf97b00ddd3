//! From a distribution's `vmlinuz` to the ELF vmlinux inside it.
//!
//! Sources: the kernel's Documentation/arch/x86/boot.rst (setup header, payload_offset) and the magic numbers of the
//! compressors in scripts/extract-vmlinux's domain: gzip, xz, LZ4's legacy frame, zstd. The payload ends with the length of what it
//! unpacks to (four bytes, little-endian), except gzip's, which has that field of its own.

use std::io::Read;

use super::read_at::{le_u16, le_u32, le_u64};

/// Largest unpacked kernel in bytes.
const MAX_VMLINUX: u64 = 256 << 20;
/// Largest block of an LZ4 legacy frame when unpacked, in bytes (fixed by that format).
const LZ4_BLOCK: usize = 8 << 20;
/// Type of the ELF note with the 32-bit PVH entry point (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// What a file is, told by its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// An x86 boot protocol image.
    BzImage,
    /// An ELF64 file for x86-64.
    Vmlinux,
    /// Something else.
    Other,
}

/// Tells a kernel's form by its content.
pub fn kind(file: &[u8]) -> KernelKind {
    let elf = file.get(..6) == Some(b"\x7fELF\x02\x01") && le_u16(file, 18) == Some(62);
    let bz_image = le_u16(file, 0x1fe) == Some(0xaa55) && file.get(0x202..0x206) == Some(b"HdrS");
    match (elf, bz_image) {
        (true, _) => KernelKind::Vmlinux,
        (_, true) => KernelKind::BzImage,
        _ => KernelKind::Other,
    }
}

/// Unpacks the vmlinux of a bzImage. The reasons for failing are for the log: the bzImage itself can still be booted.
pub fn extract_vmlinux(bz_image: &[u8]) -> Result<Vec<u8>, String> {
    let version = le_u16(bz_image, 0x206).ok_or("no setup header")?;
    if kind(bz_image) != KernelKind::BzImage || version < 0x0208 {
        return Err("boot protocol older than 2.08: it does not say where its payload lies".into());
    }
    let setup_sectors = match bz_image.get(0x1f1) {
        Some(0) => 4u64,
        Some(count) => u64::from(*count),
        None => return Err("no setup header".into()),
    };
    let offset = u64::from(le_u32(bz_image, 0x248).ok_or("no payload offset")?);
    let length = u64::from(le_u32(bz_image, 0x24c).ok_or("no payload length")?);
    let start = (setup_sectors + 1) * 512 + offset;
    let range = usize::try_from(start).ok().zip(usize::try_from(start + length).ok());
    let payload = range.and_then(|(start, end)| bz_image.get(start..end)).ok_or("payload outside the file")?;
    let vmlinux = unpack(payload)?;
    if kind(&vmlinux) != KernelKind::Vmlinux {
        return Err("the payload is not an ELF file for x86-64".into());
    }
    if !has_pvh_entry(&vmlinux) {
        return Err("its vmlinux has no PVH entry point".into());
    }
    Ok(vmlinux)
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>, String> {
    let bounded = |reader: &mut dyn Read, name: &str| {
        let mut out = Vec::new();
        reader.take(MAX_VMLINUX + 1).read_to_end(&mut out).map_err(|error| format!("{name}: {error}"))?;
        if out.len() as u64 > MAX_VMLINUX {
            Err(format!("{name}: unpacks to more than {MAX_VMLINUX} bytes"))
        } else {
            Ok(out)
        }
    };
    match payload {
        [0x1f, 0x8b, 0x08, ..] => bounded(&mut flate2::read::GzDecoder::new(payload), "gzip"),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(MAX_VMLINUX, 0).map_err(|error| error.to_string())?;
            bounded(&mut liblzma::bufread::XzDecoder::new_stream(payload, stream), "xz")
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(payload).map_err(|error| error.to_string())?;
            let mut decoder = decoder.single_frame();
            decoder.window_log_max(27).map_err(|error| error.to_string())?;
            bounded(&mut decoder, "zstd")
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => unpack_lz4_legacy(blocks),
        [a, b, c, d, ..] => Err(format!("unknown compression (starts with {a:02x} {b:02x} {c:02x} {d:02x})")),
        _ => Err("empty payload".into()),
    }
}

/// LZ4's legacy frame: blocks of a little-endian length and data, each unpacking to at most 8 MiB.
fn unpack_lz4_legacy(payload: &[u8]) -> Result<Vec<u8>, String> {
    let end = payload.len().checked_sub(4).ok_or("lz4: cut off")?;
    let expected = le_u32(payload, end).map(u64::from).filter(|size| *size <= MAX_VMLINUX).ok_or("lz4: too large")?;
    let mut rest = payload.get(..end).ok_or("lz4: cut off")?;
    let mut out = Vec::new();
    let mut block = vec![0u8; LZ4_BLOCK];
    while let Some(length) = le_u32(rest, 0) {
        let end = 4 + length as usize;
        let packed = rest.get(4..end).ok_or("lz4: a block reaches past the payload")?;
        let size = lz4_flex::block::decompress_into(packed, &mut block).map_err(|error| format!("lz4: {error}"))?;
        out.extend_from_slice(block.get(..size).ok_or("lz4: impossible block")?);
        if out.len() as u64 > expected {
            return Err("lz4: unpacks to more than it says".into());
        }
        rest = rest.get(end..).unwrap_or_default();
    }
    if out.len() as u64 == expected { Ok(out) } else { Err(format!("lz4: {} bytes instead of {expected}", out.len())) }
}

/// Whether an ELF64 file has the note with the PVH entry point.
fn has_pvh_entry(elf: &[u8]) -> bool {
    let headers = || -> Option<Vec<(u64, u64)>> {
        let (table, size, count) = (le_u64(elf, 32)?, le_u16(elf, 54)?, le_u16(elf, 56)?);
        let mut notes = Vec::new();
        for index in 0..u64::from(count) {
            let at = usize::try_from(table.checked_add(index * u64::from(size))?).ok()?;
            if le_u32(elf, at)? == 4 {
                notes.push((le_u64(elf, at.checked_add(8)?)?, le_u64(elf, at.checked_add(32)?)?));
            }
        }
        Some(notes)
    };
    headers().unwrap_or_default().into_iter().any(|(offset, size)| {
        let start = usize::try_from(offset).ok();
        let end = offset.checked_add(size).and_then(|end| usize::try_from(end).ok());
        start.zip(end).and_then(|(start, end)| elf.get(start..end)).is_some_and(notes_have_pvh)
    })
}

fn notes_have_pvh(mut notes: &[u8]) -> bool {
    while let (Some(name_size), Some(content_size), Some(kind)) = (le_u32(notes, 0), le_u32(notes, 4), le_u32(notes, 8))
    {
        let padded = |size: u32| (size as usize).next_multiple_of(4);
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") {
            return true;
        }
        let next = 12 + padded(name_size) + padded(content_size);
        notes = notes.get(next..).unwrap_or_default();
    }
    false
}
