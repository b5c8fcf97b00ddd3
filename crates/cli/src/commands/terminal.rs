//! The terminal in raw mode, and the keys that end a console.

use std::io::{self, IsTerminal};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Standard input in raw mode until dropped.
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// `None` when standard input or output is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // What was typed ahead belongs to the console, not to the shell.
        let _ = tcsetattr(io::stdin(), SetArg::TCSAFLUSH, &self.before);
    }
}

/// Ctrl-], telnet's escape.
const CTRL_BRACKET: u8 = 0x1d;

/// Finds `~.` at the start of a line, or Ctrl-] anywhere, in what is typed.
#[derive(Debug)]
pub struct EscapeKeys {
    at_line_start: bool,
    tilde: bool,
}

impl Default for EscapeKeys {
    fn default() -> Self {
        Self { at_line_start: true, tilde: false }
    }
}

impl EscapeKeys {
    /// What to send of `typed`, and whether the console is to end.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut send = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            match (std::mem::take(&mut self.tilde), byte) {
                (_, CTRL_BRACKET) | (true, b'.') => return (send, true),
                (false, b'~') if self.at_line_start => {
                    self.tilde = true;
                    continue;
                }
                // ~~ sends one.
                (true, b'~') => send.push(b'~'),
                (true, byte) => send.extend([b'~', byte]),
                (false, byte) => send.push(byte),
            }
            self.at_line_start = matches!(byte, b'\r' | b'\n');
        }
        (send, false)
    }
}

/// Looks for a text in a stream of pieces.
#[derive(Debug)]
pub struct Finder {
    wanted: Vec<u8>,
    tail: Vec<u8>,
}

impl Finder {
    /// Looks for `wanted`; an empty one is found at once.
    pub fn new(wanted: &str) -> Self {
        Self { wanted: wanted.as_bytes().to_vec(), tail: Vec::new() }
    }

    /// Whether the text ends in this piece or before.
    pub fn push(&mut self, piece: &[u8]) -> bool {
        self.tail.extend_from_slice(piece);
        if self.wanted.is_empty() || self.tail.windows(self.wanted.len()).any(|window| window == self.wanted) {
            return true;
        }
        let keep = self.tail.len().min(self.wanted.len() - 1);
        self.tail.drain(..self.tail.len() - keep);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn typed(pieces: &[&str]) -> (String, bool) {
        let mut keys = EscapeKeys::default();
        let mut sent = Vec::new();
        for piece in pieces {
            let (send, end) = keys.filter(piece.as_bytes());
            sent.extend(send);
            if end {
                return (String::from_utf8(sent).unwrap(), true);
            }
        }
        (String::from_utf8(sent).unwrap(), false)
    }

    #[test]
    fn only_an_escape_at_the_start_of_a_line_ends() {
        assert_eq!(typed(&["~."]), (String::new(), true));
        assert_eq!(typed(&["ls\r~", "."]), ("ls\r".into(), true));
        assert_eq!(typed(&["ls ~."]), ("ls ~.".into(), false));
        assert_eq!(typed(&["~~.\r"]), ("~.\r".into(), false));
        assert_eq!(typed(&["~/bin\r"]), ("~/bin\r".into(), false));
        assert_eq!(typed(&["abc\x1ddef"]), ("abc".into(), true));
        assert_eq!(typed(&["~", "\x1d"]), (String::new(), true));
    }

    proptest! {
        #[test]
        fn a_text_is_found_however_it_is_cut(text in "[ab]{0,40}", wanted in "[ab]{1,5}", cuts in prop::collection::vec(1usize..6, 40)) {
            let mut finder = Finder::new(&wanted);
            let mut rest = text.as_bytes();
            let mut found = false;
            for cut in cuts {
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                found = found || finder.push(piece);
                rest = more;
            }
            prop_assert_eq!(found, text.contains(&wanted));
        }
    }
}
