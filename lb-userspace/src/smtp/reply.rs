//! Replies (RFC 5321 §4.2): reading a member's, writing our own.

use std::fmt;

/// Longest reply line we take from a member, in octets, CRLF included.
///
/// RFC 5321 §4.5.3.1.5 allows 512; servers with long AUTH or LIMITS lists exceed it.
pub const MAX_LINE: usize = 2048;

/// Largest reply we take from a member, in octets, all lines and CRLFs included.
pub const MAX_REPLY: usize = 16 * 1024;

/// A complete reply, one line or many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// 200 to 599.
    pub code: u16,
    raw: Vec<u8>,
}

/// Cuts a member's byte stream into replies.
///
/// Holds at most what was pushed and not yet returned; a reply beyond [`MAX_REPLY`] is an error.
#[derive(Debug, Default)]
pub struct ReplyParser {
    buffer: Vec<u8>,
    /// Where the reply in progress starts.
    start: usize,
    /// Where its next line starts.
    line: usize,
    /// How far that line was searched for its end.
    searched: usize,
    code: Option<u16>,
}

/// Why bytes are not a reply. The stream cannot be used further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// No code of three digits from 200 to 599 at the start of a line.
    #[error("a reply line does not start with a code from 200 to 599")]
    NoCode,
    /// The code is followed by neither space, hyphen nor CRLF.
    #[error("a reply code is followed by neither space nor hyphen")]
    NoSeparator,
    /// The lines of one reply disagree.
    #[error("the lines of a reply carry different codes")]
    CodeChanged,
    /// A CR without LF, a LF without CR, or NUL.
    #[error("a reply contains a bare CR, a bare LF or NUL")]
    BareControl,
    /// A line beyond [`MAX_LINE`].
    #[error("a reply line is longer than {MAX_LINE} octets")]
    LineTooLong,
    /// A reply beyond [`MAX_REPLY`].
    #[error("a reply is longer than {MAX_REPLY} octets")]
    TooLong,
}

impl ReplyParser {
    /// A parser at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes and returns the next reply once it is complete.
    ///
    /// Bytes behind it stay inside: push an empty slice for the reply that follows.
    ///
    /// # Errors
    /// The bytes are not a reply; every further call may return anything.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Reply>, ReplyError> {
        if self.start > 0 && !bytes.is_empty() {
            // What was returned is done with: a stream that never rests must not pile it up.
            self.buffer.drain(..self.start);
            self.line -= self.start;
            self.searched -= self.start;
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
        while let Some(end) = self.line_end()? {
            let line = &self.buffer[self.line..end];
            let (code, last) = parse_line(line)?;
            if self.code.is_some_and(|first| first != code) {
                return Err(ReplyError::CodeChanged);
            }
            self.code = Some(code);
            self.line = end;
            self.searched = end;
            if end - self.start > MAX_REPLY {
                return Err(ReplyError::TooLong);
            }
            if last {
                return Ok(Some(self.take(code)));
            }
        }
        if self.buffer.len() - self.start > MAX_REPLY {
            return Err(ReplyError::TooLong);
        }
        Ok(None)
    }

    /// Are there bytes inside that belong to no returned reply?
    pub fn has_rest(&self) -> bool {
        self.start < self.buffer.len()
    }

    /// The position behind the CRLF of the line in progress.
    fn line_end(&mut self) -> Result<Option<usize>, ReplyError> {
        let found = self.buffer[self.searched..]
            .iter()
            .position(|byte| *byte == b'\n');
        let end = match found {
            Some(at) => self.searched + at + 1,
            None => self.buffer.len(),
        };
        if end - self.line > MAX_LINE {
            return Err(ReplyError::LineTooLong);
        }
        self.searched = end;
        Ok(found.map(|_| end))
    }

    fn take(&mut self, code: u16) -> Reply {
        let raw = if self.start == 0 && self.line == self.buffer.len() {
            std::mem::take(&mut self.buffer)
        } else {
            self.buffer[self.start..self.line].to_vec()
        };
        if self.line >= self.buffer.len() {
            // An idle stream holds no memory.
            self.buffer = Vec::new();
            (self.start, self.line, self.searched) = (0, 0, 0);
        } else {
            self.start = self.line;
        }
        self.code = None;
        Reply { code, raw }
    }
}

impl Reply {
    /// The bytes as received, every CRLF included.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// The text of each line, without code, separator and CRLF.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.raw
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| line.get(4..line.len() - 2).unwrap_or_default())
    }

    /// The lines as text, joined by spaces, for logs: whatever is not printable is escaped.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for line in self.lines() {
            if !text.is_empty() {
                text.push(' ');
            }
            text.extend(String::from_utf8_lossy(line).chars().flat_map(|c| {
                let escaped = c.is_control().then(|| c.escape_default());
                let plain = escaped.is_none().then_some(c);
                escaped.into_iter().flatten().chain(plain)
            }));
        }
        text
    }

    /// 2yz: done.
    pub fn is_positive(&self) -> bool {
        self.code / 100 == 2
    }

    /// 4yz: not now.
    pub fn is_transient(&self) -> bool {
        self.code / 100 == 4
    }

    /// 5yz: never.
    pub fn is_permanent(&self) -> bool {
        self.code / 100 == 5
    }
}

/// A reply that is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// 200 to 599.
    pub code: u16,
    /// RFC 3463, class included.
    pub enhanced: &'static str,
    /// What a person reads.
    pub text: &'static str,
}

impl Local {
    /// A reply with its enhanced code and text.
    pub const fn new(code: u16, enhanced: &'static str, text: &'static str) -> Self {
        Self {
            code,
            enhanced,
            text,
        }
    }

    /// Appends the line, with or without the enhanced code (RFC 2034 §4).
    pub fn write(&self, out: &mut Vec<u8>, enhanced: bool) {
        out.extend_from_slice(self.code.to_string().as_bytes());
        out.push(b' ');
        if enhanced {
            out.extend_from_slice(self.enhanced.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(self.text.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.code, self.enhanced, self.text)
    }
}

/// The code of a line that ends in LF, and whether it is the last of its reply.
fn parse_line(line: &[u8]) -> Result<(u16, bool), ReplyError> {
    let Some(text) = line.strip_suffix(b"\r\n") else {
        return Err(ReplyError::BareControl);
    };
    if text.iter().any(|byte| matches!(byte, b'\r' | 0)) {
        return Err(ReplyError::BareControl);
    }
    let digits = text
        .get(..3)
        .filter(|code| code.iter().all(u8::is_ascii_digit));
    let code = digits
        .map(|code| {
            code.iter()
                .fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0'))
        })
        .filter(|code| (200..600).contains(code))
        .ok_or(ReplyError::NoCode)?;
    match text.get(3) {
        None | Some(b' ') => Ok((code, true)),
        Some(b'-') => Ok((code, false)),
        Some(_) => Err(ReplyError::NoSeparator),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Result<Vec<(u16, Vec<String>)>, ReplyError> {
        let mut parser = ReplyParser::new();
        let mut replies = Vec::new();
        let mut next = parser.push(bytes)?;
        while let Some(reply) = next {
            let lines = reply
                .lines()
                .map(|l| String::from_utf8_lossy(l).into_owned());
            replies.push((reply.code, lines.collect()));
            next = parser.push(&[])?;
        }
        Ok(replies)
    }

    #[test]
    fn one_line_many_lines_and_several_replies() {
        let replies =
            all(b"250-a\r\n250-b c\r\n250 d\r\n354 go\r\n250\r\n220 \r\n221 half").unwrap();
        assert_eq!(
            replies,
            [
                (250, vec!["a".into(), "b c".into(), "d".into()]),
                (354, vec!["go".into()]),
                (250, vec![String::new()]),
                (220, vec![String::new()]),
            ]
        );
    }

    #[test]
    fn cut_anywhere_is_the_same() {
        let stream = b"220-hello\r\n220 there\r\n250 ok\r\n";
        for cut in 0..=stream.len() {
            let mut parser = ReplyParser::new();
            let mut raw = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                let mut next = parser.push(part).unwrap();
                while let Some(reply) = next {
                    raw.push((reply.code, reply.raw().to_vec()));
                    next = parser.push(&[]).unwrap();
                }
            }
            assert_eq!(raw.len(), 2, "cut at {cut}");
            assert_eq!(raw[0], (220, b"220-hello\r\n220 there\r\n".to_vec()));
            assert_eq!(raw[1], (250, b"250 ok\r\n".to_vec()));
            assert!(!parser.has_rest());
        }
    }

    #[test]
    fn refuses_what_is_no_reply() {
        for (bytes, error) in [
            (&b"hello\r\n"[..], ReplyError::NoCode),
            (b"\r\n", ReplyError::NoCode),
            (b"199 x\r\n", ReplyError::NoCode),
            (b"600 x\r\n", ReplyError::NoCode),
            (b"25\r\n", ReplyError::NoCode),
            (b"2500 x\r\n", ReplyError::NoSeparator),
            (b"250-a\r\n251 b\r\n", ReplyError::CodeChanged),
            (b"250 a\n", ReplyError::BareControl),
            (b"250 a\rb\r\n", ReplyError::BareControl),
            (b"250 a\0\r\n", ReplyError::BareControl),
        ] {
            assert_eq!(all(bytes), Err(error), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn memory_is_bounded() {
        assert_eq!(all(&[b'2'; MAX_LINE + 1]), Err(ReplyError::LineTooLong));
        let endless = b"250-more and more\r\n".repeat(MAX_REPLY / 19 + 1);
        assert_eq!(all(&endless), Err(ReplyError::TooLong));
        // Many small replies in one push are no large reply.
        let replies = all(&b"250 ok\r\n".repeat(MAX_REPLY / 4)).unwrap();
        assert_eq!(replies.len(), MAX_REPLY / 4);
    }

    #[test]
    fn a_stream_that_never_rests_does_not_pile_up() {
        let mut parser = ReplyParser::new();
        assert_eq!(parser.push(b"2"), Ok(None));
        for _ in 0..10_000 {
            let reply = parser.push(b"50-a\r\n250 b\r\n2").unwrap().unwrap();
            assert_eq!(reply.raw(), b"250-a\r\n250 b\r\n");
            assert!(parser.buffer.len() < 100);
        }
    }

    #[test]
    fn text_for_logs_is_printable() {
        let mut parser = ReplyParser::new();
        let reply = parser
            .push(b"554-no\x1b[2J\r\n554 \xff way\r\n")
            .unwrap()
            .unwrap();
        assert_eq!(reply.text(), "no\\u{1b}[2J \u{fffd} way");
        assert!(reply.is_permanent() && !reply.is_transient() && !reply.is_positive());
    }

    #[test]
    fn local_replies_carry_enhanced_codes_after_ehlo_only() {
        let reply = Local::new(530, "5.7.0", "Must issue a STARTTLS command first");
        let mut out = Vec::new();
        reply.write(&mut out, true);
        reply.write(&mut out, false);
        assert_eq!(
            out,
            b"530 5.7.0 Must issue a STARTTLS command first\r\n530 Must issue a STARTTLS command first\r\n"
        );
    }
}
