//! Formats and their signatures.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

use thiserror::Error;

use crate::error::ImageError;

/// Formats that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes of the disk, as they are.
    Raw,
    /// QEMU copy-on-write 2 and 3: <https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst>
    Qcow2,
    /// VMware's virtual disk, monolithicSparse and streamOptimized ("Virtual Disk Format 5.0").
    Vmdk,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Qcow2, Self::Vmdk];

    /// Its name, as used by the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of the formats.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("'{0}' is not an image format; formats are raw, qcow2, vmdk")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;
    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| UnknownFormat(text.to_owned()))
    }
}

pub(crate) const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
pub(crate) const VMDK_MAGIC: &[u8] = b"KDMV";
const VMDK_DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";

/// Signatures of files that people upload by mistake: offset, bytes, what it is, what to do.
const FOREIGN: &[(usize, &[u8], &str, &str)] = &[
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first (gunzip)"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it first (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first (unzstd)"),
    (0, b"BZh", "a bzip2 archive", "unpack it first (bunzip2)"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first (unzip)"),
    (0, b"\x7fELF", "an ELF program", "name a disk image"),
    (0, b"vhdxfile", "a VHDX image", "convert it first: qemu-img convert -O qcow2 IN OUT"),
    (0, b"conectix", "a VHD image", "convert it first: qemu-img convert -O qcow2 IN OUT"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image", "convert it first: qemu-img convert -O qcow2 IN OUT"),
    (0, b"QED\0", "a QED image", "convert it first: qemu-img convert -O qcow2 IN OUT"),
    (0, b"COWD", "a VMFS sparse extent", "export the disk as OVF/OVA and import its streamOptimized vmdk"),
    (257, b"ustar", "a tar (or OVA) archive", "unpack it first (tar) and import the disk inside"),
];

/// Tells the format by content. Whatever has no known signature is raw. Errors when the file cannot be read, is empty or
/// is well known not to be a disk image.
pub fn detect(file: &Path) -> Result<Format, ImageError> {
    let opened = File::open(file).map_err(ImageError::io("open", file))?;
    detect_opened(&opened, file)
}

pub(crate) fn detect_opened(file: &File, path: &Path) -> Result<Format, ImageError> {
    let mut head = [0u8; 512];
    let mut filled = 0;
    while let Some(rest) = head.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ImageError::io("read", path)(error)),
        }
    }
    if filled == 0 {
        return Err(ImageError::Empty);
    }
    let has = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|tail| tail.starts_with(magic));
    if has(0, QCOW2_MAGIC) {
        return Ok(Format::Qcow2);
    }
    if has(0, VMDK_MAGIC) || has(0, VMDK_DESCRIPTOR) {
        return Ok(Format::Vmdk);
    }
    match FOREIGN.iter().find(|(offset, magic, ..)| has(*offset, magic)) {
        Some((_, _, what, advice)) => Err(ImageError::Foreign { what, advice }),
        None => Ok(Format::Raw),
    }
}
