//! The few fields of a client's packet that the server acts on.
//!
//! Read here and not by the library that encodes the answers: that one's decoder asserts option lengths, and a guest
//! must not be able to end the agent.
//! Source: RFC 2131 section 2 (header), RFC 2132 (options).

use std::net::Ipv4Addr;

/// Bytes in front of the options, magic cookie included.
const HEADER_BYTES: usize = 240;
const MAGIC_COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Client identifiers longer than this are not echoed.
const MAX_IDENTIFIER_BYTES: usize = 64;

/// A client's request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub transaction: u32,
    pub mac: [u8; 6],
    /// The address the client says it has; unspecified when it has none.
    pub client_address: Ipv4Addr,
    /// Option 53, as its number.
    pub message_type: u8,
    /// Option 50.
    pub requested_address: Option<Ipv4Addr>,
    /// Option 54.
    pub server: Option<Ipv4Addr>,
    /// Option 61.
    pub client_identifier: Option<Vec<u8>>,
}

impl Request {
    /// `None` for everything that is not a DHCP request of a directly connected Ethernet client.
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let [operation, hardware_type, hardware_length, hops] = *packet.first_chunk()?;
        let relay = address(packet.get(24..28)?)?;
        let cookie = packet.get(HEADER_BYTES - 4..HEADER_BYTES)?;
        if (operation, hardware_type, hardware_length, hops) != (1, 1, 6, 0)
            || !relay.is_unspecified()
            || cookie != MAGIC_COOKIE
        {
            return None;
        }
        let mut request = Self {
            transaction: u32::from_be_bytes(packet.get(4..8)?.try_into().ok()?),
            mac: packet.get(28..34)?.try_into().ok()?,
            client_address: address(packet.get(12..16)?)?,
            message_type: 0,
            requested_address: None,
            server: None,
            client_identifier: None,
        };
        let mut options = packet.get(HEADER_BYTES..)?;
        while let [code, rest @ ..] = options {
            match *code {
                0 => options = rest,
                255 => break,
                code => {
                    let [length, rest @ ..] = rest else { return None };
                    let (value, rest) = rest.split_at_checked(usize::from(*length))?;
                    match code {
                        50 => request.requested_address = Some(address(value)?),
                        53 => request.message_type = *value.first()?,
                        54 => request.server = Some(address(value)?),
                        61 if value.len() <= MAX_IDENTIFIER_BYTES => request.client_identifier = Some(value.to_vec()),
                        _ => {}
                    }
                    options = rest;
                }
            }
        }
        (request.message_type != 0).then_some(request)
    }
}

fn address(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}
