//! Disk images: formats, import, export and image files.
