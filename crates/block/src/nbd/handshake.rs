//! The client's side of NBD's fixed newstyle negotiation, without I/O: bytes in, bytes out.

use super::error::ProtocolError;
use super::wire;

/// Longest answer to an option that is read; longer ones end the connection.
const MAX_ANSWER_BYTES: u32 = 64 * 1024;
/// Most messages a server may send before it is done.
const MAX_MESSAGES: usize = 64;
/// Longest export name that every server takes (`NBD_MAX_STRING_SIZE`).
const MAX_NAME_BYTES: usize = 4096;
/// A server that names no maximum takes requests of at least this length.
const DEFAULT_MAX_BLOCK: u32 = 32 * 1024 * 1024;
/// A guest's logical block is at most a page.
const MAX_LOGICAL_BLOCK: u32 = 4096;

/// What the server offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes, a multiple of `min_block_bytes`.
    pub size_bytes: u64,
    /// Offsets and lengths are multiples of this; a power of two from 512 to 4096.
    pub min_block_bytes: u32,
    /// Best size of requests; at least `min_block_bytes`.
    pub preferred_block_bytes: u32,
    /// Longest read or write.
    pub max_payload_bytes: u32,
    /// Only reads.
    pub read_only: bool,
    /// `NBD_CMD_FLUSH`: the server has a volatile cache.
    pub flush: bool,
    /// Writes may ask to be durable at once.
    pub fua: bool,
    /// `NBD_CMD_TRIM`.
    pub trim: bool,
    /// `NBD_CMD_WRITE_ZEROES`.
    pub write_zeroes: bool,
    /// Several connections see one cache: a flush on one covers what others wrote.
    pub multi_conn: bool,
    /// Reads are answered by structured replies.
    pub structured: bool,
}

impl Export {
    /// Whether a volume that was opened with `self` can go on with `new`.
    ///
    /// # Errors
    /// What is missing, in words.
    pub(super) fn accepts(&self, new: &Self) -> Result<(), String> {
        if new.size_bytes < self.size_bytes {
            return Err(format!("it has {} bytes and had {}", new.size_bytes, self.size_bytes));
        }
        if new.min_block_bytes > self.min_block_bytes || new.max_payload_bytes < self.max_payload_bytes {
            return Err(format!(
                "it takes requests of {} to {} bytes and took {} to {}",
                new.min_block_bytes, new.max_payload_bytes, self.min_block_bytes, self.max_payload_bytes
            ));
        }
        let lost = [
            (!self.read_only && new.read_only, "writes"),
            (self.flush && !new.flush, "FLUSH"),
            (self.fua && !new.fua, "FUA"),
            (self.trim && !new.trim, "TRIM"),
            (self.write_zeroes && !new.write_zeroes, "WRITE_ZEROES"),
            (self.multi_conn && !new.multi_conn, "several connections"),
        ];
        match lost.iter().find(|(lost, _)| *lost) {
            Some((_, what)) => Err(format!("it does not take {what} any more")),
            None => Ok(()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Greeting,
    StructuredReply,
    Go,
    Done,
}

/// A negotiation under way.
#[derive(Debug)]
pub struct Handshake {
    name: String,
    step: Step,
    output: Vec<u8>,
    messages: usize,
    structured: bool,
    size_and_flags: Option<(u64, u16)>,
    block_sizes: Option<(u32, u32, u32)>,
}

impl Handshake {
    /// Asks for the export of this name; the empty name is the server's default export.
    ///
    /// # Errors
    /// [`ProtocolError::Length`]: the name has more than 4096 bytes.
    pub fn new(name: &str) -> Result<Self, ProtocolError> {
        if name.len() > MAX_NAME_BYTES {
            return Err(ProtocolError::Length { place: "export name", length: name.len() as u64 });
        }
        Ok(Self {
            name: name.to_owned(),
            step: Step::Greeting,
            output: Vec::new(),
            messages: 0,
            structured: false,
            size_and_flags: None,
            block_sizes: None,
        })
    }

    /// Bytes to send to the server.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Digests whole messages from the front of `input`; returns how many bytes it used. What it did not use is to be given
    /// again with more behind it, or, once [`export`](Self::export) is there, belongs to the transmission phase.
    ///
    /// # Errors
    /// The connection is of no use.
    pub fn receive(&mut self, input: &[u8]) -> Result<usize, ProtocolError> {
        let mut rest = input;
        while self.step != Step::Done {
            let used = match self.step {
                Step::Greeting => self.greeting(rest)?,
                _ => self.answer(rest)?,
            };
            if used == 0 {
                break;
            }
            rest = rest.get(used..).unwrap_or_default();
        }
        Ok(input.len() - rest.len())
    }

    /// The outcome, once the server is done.
    pub fn export(&self) -> Result<Option<Export>, ProtocolError> {
        if self.step != Step::Done {
            return Ok(None);
        }
        let Some((size, flags)) = self.size_and_flags else {
            return Err(ProtocolError::Export("the server did not describe it".to_owned()));
        };
        let (minimum, preferred, maximum) = self.block_sizes.unwrap_or((1, 4096, DEFAULT_MAX_BLOCK));
        let refuse = |text: String| Err(ProtocolError::Export(text));
        if flags & wire::HAS_FLAGS == 0 {
            return refuse(format!("flags {flags:#x} lack NBD_FLAG_HAS_FLAGS"));
        }
        if !minimum.is_power_of_two() || !preferred.is_power_of_two() || preferred < minimum || maximum < minimum {
            return refuse(format!("block sizes {minimum}, {preferred}, {maximum} make no sense"));
        }
        if minimum > MAX_LOGICAL_BLOCK {
            return refuse(format!(
                "it takes only blocks of {minimum} bytes, a guest's are at most {MAX_LOGICAL_BLOCK}"
            ));
        }
        let min_block_bytes = minimum.max(512);
        let max_payload_bytes = maximum.min(DEFAULT_MAX_BLOCK) / MAX_LOGICAL_BLOCK * MAX_LOGICAL_BLOCK;
        if max_payload_bytes == 0 {
            return refuse(format!("it takes at most {maximum} bytes per request"));
        }
        let size_bytes = size / u64::from(min_block_bytes) * u64::from(min_block_bytes);
        if size_bytes == 0 || size > i64::MAX as u64 {
            return refuse(format!("a size of {size} bytes"));
        }
        let read_only = flags & wire::READ_ONLY != 0;
        Ok(Some(Export {
            size_bytes,
            min_block_bytes,
            preferred_block_bytes: preferred.max(min_block_bytes),
            max_payload_bytes,
            read_only,
            flush: flags & wire::SEND_FLUSH != 0,
            fua: flags & wire::SEND_FUA != 0,
            trim: !read_only && flags & wire::SEND_TRIM != 0,
            write_zeroes: !read_only && flags & wire::SEND_WRITE_ZEROES != 0,
            multi_conn: flags & wire::CAN_MULTI_CONN != 0,
            structured: self.structured,
        }))
    }

    fn greeting(&mut self, mut input: &[u8]) -> Result<usize, ProtocolError> {
        // A peer that is something else is told apart by its first bytes; it may never send eighteen.
        let known = wire::MAGIC_SERVER.to_be_bytes();
        if input.iter().zip(known).any(|(found, expected)| *found != expected) {
            return Err(ProtocolError::NotNbd("its greeting is another one"));
        }
        let (Some(_), Some(magic), Some(flags)) =
            (wire::take_u64(&mut input), wire::take_u64(&mut input), wire::take_u16(&mut input))
        else {
            return Ok(0);
        };
        if magic != wire::MAGIC_OPTION {
            return Err(ProtocolError::NotNbd("it knows only the old negotiation"));
        }
        if flags & wire::FLAG_FIXED_NEWSTYLE == 0 {
            return Err(ProtocolError::NotNbd("it lacks NBD_FLAG_FIXED_NEWSTYLE"));
        }
        let ours = u32::from(wire::FLAG_FIXED_NEWSTYLE | flags & wire::FLAG_NO_ZEROES);
        self.output.extend_from_slice(&ours.to_be_bytes());
        self.option(wire::OPT_STRUCTURED_REPLY, &[]);
        self.step = Step::StructuredReply;
        Ok(18)
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        self.output.extend_from_slice(&wire::MAGIC_OPTION.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.output.extend_from_slice(data);
    }

    fn go(&mut self) {
        let mut data = Vec::with_capacity(self.name.len() + 8);
        data.extend_from_slice(&(self.name.len() as u32).to_be_bytes());
        data.extend_from_slice(self.name.as_bytes());
        data.extend_from_slice(&1u16.to_be_bytes());
        data.extend_from_slice(&wire::INFO_BLOCK_SIZE.to_be_bytes());
        self.option(wire::OPT_GO, &data);
        self.step = Step::Go;
    }

    /// One answer to an option.
    fn answer(&mut self, mut input: &[u8]) -> Result<usize, ProtocolError> {
        let Some(magic) = wire::take_u64(&mut input) else { return Ok(0) };
        if magic != wire::MAGIC_OPTION_REPLY {
            return Err(ProtocolError::Magic { place: "an option's answer", found: magic });
        }
        let (Some(option), Some(kind), Some(length)) =
            (wire::take_u32(&mut input), wire::take_u32(&mut input), wire::take_u32(&mut input))
        else {
            return Ok(0);
        };
        let expected = if self.step == Step::Go { wire::OPT_GO } else { wire::OPT_STRUCTURED_REPLY };
        if option != expected {
            return Err(ProtocolError::WrongOption { expected, found: option });
        }
        if length > MAX_ANSWER_BYTES {
            return Err(ProtocolError::Length { place: "an option's answer", length: u64::from(length) });
        }
        let Some(data) = input.get(..length as usize) else { return Ok(0) };
        self.messages += 1;
        if self.messages > MAX_MESSAGES {
            return Err(ProtocolError::Endless(MAX_MESSAGES));
        }
        match (self.step, kind) {
            (Step::StructuredReply, _) if kind == wire::REP_ACK || kind & wire::REP_ERROR != 0 => {
                self.structured = kind == wire::REP_ACK;
                self.go();
            }
            (Step::Go, wire::REP_INFO) => self.info(data)?,
            (Step::Go, wire::REP_ACK) => self.step = Step::Done,
            (Step::Go, _) if kind & wire::REP_ERROR != 0 => {
                let message: String =
                    String::from_utf8_lossy(data).chars().filter(|c| !c.is_control()).take(256).collect();
                return Err(ProtocolError::Refused { name: self.name.clone(), kind, message });
            }
            _ => return Err(ProtocolError::UnexpectedAnswer { option, kind }),
        }
        Ok(20 + data.len())
    }

    fn info(&mut self, mut data: &[u8]) -> Result<(), ProtocolError> {
        let length = data.len() as u64;
        let wrong = ProtocolError::Length { place: "NBD_REP_INFO", length };
        let kind = wire::take_u16(&mut data).ok_or(wrong.clone())?;
        match kind {
            wire::INFO_EXPORT => match (wire::take_u64(&mut data), wire::take_u16(&mut data), data) {
                (Some(size), Some(flags), []) => self.size_and_flags = Some((size, flags)),
                _ => return Err(wrong),
            },
            wire::INFO_BLOCK_SIZE => {
                let sizes = (wire::take_u32(&mut data), wire::take_u32(&mut data), wire::take_u32(&mut data), data);
                match sizes {
                    (Some(minimum), Some(preferred), Some(maximum), []) => {
                        self.block_sizes = Some((minimum, preferred, maximum));
                    }
                    _ => return Err(wrong),
                }
            }
            // A name, a description, or something newer: clients ignore what they did not ask for.
            _ => {}
        }
        Ok(())
    }
}
