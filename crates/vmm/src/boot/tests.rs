use std::io::Write;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mem::layout::{self, PVH_MODULES, PVH_START_INFO, ZERO_PAGE};

const ENTRY: u32 = 0x100_0040;

/// An ELF kernel with one page-aligned segment of `file_size` bytes (value 0x5a), some bss, and a PVH note.
fn elf(file_size: u64, bss: u64) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&ENTRY.to_le_bytes());
    let mut header = vec![0u8; 64];
    header[..6].copy_from_slice(b"\x7fELF\x02\x01");
    header[18..20].copy_from_slice(&62u16.to_le_bytes());
    header[32..40].copy_from_slice(&64u64.to_le_bytes());
    header[54..56].copy_from_slice(&56u16.to_le_bytes());
    header[56..58].copy_from_slice(&2u16.to_le_bytes());
    let program_header = |kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        for word in [offset, address, address, file, memory, 4096] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    };
    header.extend(program_header(1, 0x1000, 0x100_0000, file_size, file_size + bss));
    header.extend(program_header(4, 0x800, 0, note.len() as u64, note.len() as u64));
    header.resize(0x800, 0);
    header.extend(note);
    header.resize(0x1000, 0);
    header.resize(0x1000 + file_size as usize, 0x5a);
    header
}

/// A bzImage of protocol 2.15 with `payload` bytes behind its setup sectors.
fn bz_image(payload: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; 1024];
    bytes[0x1f1] = 1;
    bytes[0x201] = 0x6a;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    bytes[0x236..0x238].copy_from_slice(&0x7fu16.to_le_bytes());
    bytes[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    bytes[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&0x200_0000u32.to_le_bytes());
    bytes.resize(1024 + payload, 0x6b);
    bytes
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn boot(memory: &Memory, kernel: &[u8], initrd: Option<&[u8]>, placement: Placement) -> Result<Entry, BootError> {
    let (kernel, initrd) = (file(kernel), initrd.map(file));
    let images = Images { kernel: &kernel, initrd: initrd.as_ref(), cmdline: "console=ttyS0", placement };
    load(memory, &images, layout::ACPI_TABLES)
}

fn word(memory: &Memory, address: u64) -> u64 {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

fn byte(memory: &Memory, address: u64) -> u8 {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn an_elf_kernel_is_placed_copied_or_mapped() {
    for placement in [Placement::Copy, Placement::Map] {
        let memory = Memory::new(128).unwrap();
        // RAM is zero when a machine starts; here something lies where the bss will be to see that nothing is written there.
        memory.write(0x100_3000, &[0x77]).unwrap();
        let entry = boot(&memory, &elf(0x2345, 0x4000), Some(&[9; 5000]), placement).unwrap();
        assert_eq!(entry, Entry::Pvh { entry: ENTRY });
        assert_eq!((byte(&memory, 0x100_0000), byte(&memory, 0x100_2344)), (0x5a, 0x5a), "{placement:?}");
        assert_eq!((byte(&memory, 0x100_2345), byte(&memory, 0x100_3000)), (0, 0x77), "{placement:?}");
        let info = |at| word(&memory, PVH_START_INFO + at);
        assert_eq!((info(0) as u32, info(16), info(32)), (0x336e_c578, PVH_MODULES, layout::ACPI_TABLES));
        let (start, size) = (word(&memory, PVH_MODULES), word(&memory, PVH_MODULES + 8));
        assert_eq!((size, start % 4096, byte(&memory, start), byte(&memory, start + 4999)), (5000, 0, 9, 9));
        assert!(start + size <= memory.layout().low);
        let mut text = [0u8; 14];
        memory.ram().read_slice(&mut text, GuestAddress(layout::COMMAND_LINE)).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
    }
}

#[test]
fn a_bz_image_gets_its_zero_page() {
    let memory = Memory::new(4096).unwrap();
    let entry = boot(&memory, &bz_image(0x3000), Some(&[9; 100]), Placement::Map).unwrap();
    assert_eq!(entry, Entry::Linux64 { entry: 0x100_0200 });
    assert_eq!(byte(&memory, 0x100_2fff), 0x6b);
    let half = |at| word(&memory, ZERO_PAGE + at) as u32;
    assert_eq!((half(0x202), half(0x228)), (u32::from_le_bytes(*b"HdrS"), layout::COMMAND_LINE as u32));
    let (start, size) = (u64::from(half(0x218)), half(0x21c));
    assert!(start + 100 <= 0x8000_0000, "initrd_addr_max");
    assert_eq!((size, byte(&memory, start)), (100, 9));
    assert_eq!(byte(&memory, ZERO_PAGE + 0x1e8), 5);
    assert_eq!(
        (word(&memory, layout::SETUP_DATA + 8) as u32, word(&memory, ZERO_PAGE + 0x250)),
        (9, layout::SETUP_DATA)
    );
}

#[test]
fn wrong_inputs_are_named() {
    let memory = Memory::new(128).unwrap();
    let refused =
        |kernel: &[u8], initrd: Option<&[u8]>| boot(&memory, kernel, initrd, Placement::Copy).unwrap_err().to_string();
    assert!(refused(&[], None).contains("cannot read the kernel"));
    assert!(refused(&[0; 8192], None).contains("neither"));
    assert!(refused(b"MZ not a kernel", None).contains("neither"));
    assert!(refused(&elf(0x1000, 512 << 20), None).contains("does not fit"));
    let mut no_note = elf(0x1000, 0);
    no_note[0x808] = 19;
    assert!(refused(&no_note, None).contains("PVH"));
    let mut outside = elf(0x10, 0);
    outside[0x810..0x814].copy_from_slice(&0xdead_0000u32.to_le_bytes());
    assert!(refused(&outside, None).contains("outside its segments"));
    let mut low = elf(0x1000, 0);
    low[64 + 24..64 + 32].copy_from_slice(&0x1000u64.to_le_bytes());
    assert!(refused(&low, None).contains("below 1 MiB"));
    assert!(refused(&bz_image(16), None).contains("ends before"));
    let mut old = bz_image(4096);
    old[0x206] = 9;
    assert!(refused(&old, None).contains("2.12"));
    let big = file(&[]);
    big.set_len(200 << 20).unwrap();
    let kernel = file(&elf(0x1000, 0));
    let placement = Placement::Copy;
    let images = Images { kernel: &kernel, initrd: Some(&big), cmdline: "", placement };
    assert!(matches!(load(&memory, &images, 0), Err(BootError::TooBig { what: "initrd", .. })));
    let long = "x".repeat(COMMAND_LINE_MAX + 1);
    for cmdline in [long.as_str(), "a\0b"] {
        assert!(matches!(load(&memory, &Images { cmdline, initrd: None, ..images }, 0), Err(BootError::CommandLine)));
    }
}

/// Numbers that break loaders: zero, small, aligned, huge, wrapping.
fn nasty() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        0u64..0x3000,
        Just(0x100_0000),
        Just(128 << 20),
        Just(u64::MAX),
        Just(u64::MAX - 0xfff),
        Just(1 << 63),
        any::<u64>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_elf_headers_get_an_error_or_a_sound_placement(
        edits in prop::collection::vec((0usize..0x81c, nasty(), prop::sample::select(vec![1usize, 2, 4, 8])), 1..6),
        cut in prop_oneof![Just(usize::MAX), 0usize..0x2000],
        map: bool,
    ) {
        let memory = Memory::new(128).unwrap();
        memory.write(layout::ACPI_TABLES, &[0xaa; 16]).unwrap();
        let mut bytes = elf(0x1800, 0x1000);
        for (at, value, width) in edits {
            let at = at.min(bytes.len() - width);
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        bytes.truncate(cut);
        let placement = if map { Placement::Map } else { Placement::Copy };
        let _ = boot(&memory, &bytes, Some(&[1; 64]), placement);
        prop_assert_eq!(byte(&memory, layout::ACPI_TABLES), 0xaa, "below 1 MiB nothing is loaded");
    }

    #[test]
    fn hostile_bz_images_get_an_error_or_a_sound_placement(
        edits in prop::collection::vec((0x1f1usize..0x270, nasty(), prop::sample::select(vec![1usize, 2, 4, 8])), 1..6),
        cut in prop_oneof![Just(usize::MAX), 0usize..0x1400],
    ) {
        let memory = Memory::new(128).unwrap();
        memory.write(layout::ACPI_TABLES, &[0xaa; 16]).unwrap();
        let mut bytes = bz_image(0x1000);
        for (at, value, width) in edits {
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        bytes.truncate(cut);
        let _ = boot(&memory, &bytes, Some(&[1; 64]), Placement::Copy);
        prop_assert_eq!(byte(&memory, layout::ACPI_TABLES), 0xaa, "below 1 MiB nothing is loaded");
    }

    #[test]
    fn any_notes_are_searched_safely(notes in prop::collection::vec(any::<u8>(), 0..200), sizes: [u32; 3]) {
        let _ = elf::find_note(&notes, b"Xen\0", 18);
        let mut crafted: Vec<u8> = sizes.iter().flat_map(|w| w.to_le_bytes()).collect();
        crafted.extend_from_slice(&notes);
        let _ = elf::find_note(&crafted, b"Xen\0", 18);
    }
}
