//! The program to run and what its empty root must hold.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::boot::le_u16;
use crate::boot::le_u32;
use crate::boot::le_u64;

/// `hearth-vmm`, opened once: a running agent starts the program it found, and all VMMs share its pages.
#[derive(Debug)]
pub struct Program {
    /// The program.
    pub file: File,
    /// Folders of the host's shared libraries to show read-only inside the jail. Empty for a static program, as it should be.
    pub libraries: Vec<Library>,
}

/// A folder to bind into the jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// On the host.
    pub source: CString,
    /// Relative to the jail's root, parents first.
    pub target: CString,
}

impl Program {
    /// Opens the program and looks whether it needs shared libraries.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let libraries = if is_static(&file)? { Vec::new() } else { host_libraries()? };
        Ok(Self { file, libraries })
    }
}

/// An ELF file without PT_INTERP needs no dynamic linker.
fn is_static(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    const PT_INTERP: u32 = 3;
    let wrong = || io::Error::other("not an ELF program for x86-64");
    let mut header = [0u8; 64];
    file.read_exact_at(&mut header, 0).map_err(|_| wrong())?;
    if !header.starts_with(b"\x7fELF\x02\x01") || le_u16(&header, 18) != Some(62) {
        return Err(wrong());
    }
    let (Some(table), Some(size), Some(count)) = (le_u64(&header, 32), le_u16(&header, 54), le_u16(&header, 56)) else {
        return Err(wrong());
    };
    let mut entry = [0u8; 4];
    for index in 0..u64::from(count) {
        file.read_exact_at(&mut entry, table.saturating_add(index * u64::from(size))).map_err(|_| wrong())?;
        if le_u32(&entry, 0) == Some(PT_INTERP) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn host_libraries() -> io::Result<Vec<Library>> {
    let mut libraries = Vec::new();
    for folder in ["lib", "lib64", "usr/lib", "usr/lib64"] {
        let source = PathBuf::from("/").join(folder);
        if source.is_dir() {
            let source = CString::new(source.as_os_str().as_bytes())?;
            libraries.push(Library { source, target: CString::new(folder)? });
        }
    }
    Ok(libraries)
}
