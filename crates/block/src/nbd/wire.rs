//! Numbers of the NBD protocol (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>). All integers on the wire
//! are big-endian.

/// `NBDMAGIC`
pub(super) const MAGIC_SERVER: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`
pub(super) const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
pub(super) const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(super) const MAGIC_REQUEST: u32 = 0x2560_9513;
pub(super) const MAGIC_SIMPLE_REPLY: u32 = 0x6744_6698;
pub(super) const MAGIC_STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Handshake flags, both directions.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 2;

pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
/// Set in every error answer to an option.
pub(super) const REP_ERROR: u32 = 1 << 31;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags.
pub(super) const HAS_FLAGS: u16 = 1 << 0;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;

/// Commands.
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;

/// Command flags.
pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// Structured reply chunks.
pub(super) const CHUNK_FLAG_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_OFFSET_DATA: u16 = 1;
pub(super) const CHUNK_OFFSET_HOLE: u16 = 2;
/// Set in every error chunk.
pub(super) const CHUNK_ERROR: u16 = 1 << 15;

pub(super) const REQUEST_BYTES: usize = 28;
pub(super) const SIMPLE_REPLY_BYTES: usize = 16;
pub(super) const STRUCTURED_REPLY_BYTES: usize = 20;

const ESHUTDOWN: u32 = 108;

/// A command's header.
pub(super) fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let fields: [&[u8]; 6] = [
        &MAGIC_REQUEST.to_be_bytes(),
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    bytes
}

/// How a server's error number is told to the guest's side. Numbers outside of the protocol's list count as `EINVAL`, as
/// the protocol asks for.
pub(super) fn errno(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        ESHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    }
}

/// Takes a big-endian number of `N` bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

pub(super) fn take_u16(bytes: &mut &[u8]) -> Option<u16> {
    take(bytes).map(u16::from_be_bytes)
}

pub(super) fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    take(bytes).map(u32::from_be_bytes)
}

pub(super) fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    take(bytes).map(u64::from_be_bytes)
}
