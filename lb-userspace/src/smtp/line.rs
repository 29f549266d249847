//! Command lines: CRLF ends one and nothing else does (RFC 5321 §2.3.8).

use std::borrow::Cow;

/// Longest command line, in octets, CRLF included.
///
/// RFC 5321 §4.5.3.1.4 says 512; SIZE, BODY, SMTPUTF8, AUTH=, RET, ENVID, NOTIFY and ORCPT add at
/// most 1,200 together (RFC 1870, 4954, 3461, 6531).
pub const MAX_COMMAND: usize = 2048;

/// Longest AUTH command and longest line of an AUTH exchange, in octets, CRLF included (RFC 4954 §4).
pub const MAX_AUTH: usize = 12 * 1024;

/// Cuts a client's byte stream into command lines; holds the unfinished one.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
    swallow: Option<Swallow>,
}

/// A line that was answered already and whose end is still awaited.
#[derive(Debug, Clone, Copy)]
struct Swallow {
    length: usize,
    after_cr: bool,
}

/// What the bytes turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A line, without its CRLF.
    Complete(Cow<'a, [u8]>),
    /// A bare CR, a bare LF or NUL; said once for a line, whose rest is swallowed up to its CRLF.
    BareControl,
    /// No CRLF within the limit. The stream cannot be used further.
    TooLong,
    /// The line starts as a TLS handshake record does (RFC 8446 §5.1); its rest is swallowed, too.
    ClientHello,
}

impl Lines {
    /// Takes bytes from `input` up to the end of a line.
    ///
    /// Returns how many it took and what they completed, if anything. `auth` says that an AUTH
    /// exchange goes on, so that the line may be long.
    pub fn next<'a>(&mut self, input: &'a [u8], auth: bool) -> (usize, Option<Line<'a>>) {
        let skipped = match self.swallow(input) {
            Swallowed::None => 0,
            Swallowed::Line(skipped) => skipped,
            Swallowed::All => return (input.len(), None),
            Swallowed::TooLong => return (input.len(), Some(Line::TooLong)),
        };
        let input = &input[skipped..];
        let (taken, line) = self.find(input, auth);
        (skipped + taken, line)
    }

    /// Is there no unfinished line?
    pub fn is_at_start(&self) -> bool {
        self.partial.is_empty() && self.swallow.is_none()
    }

    fn find<'a>(&mut self, input: &'a [u8], auth: bool) -> (usize, Option<Line<'a>>) {
        let before = self.partial.len();
        let mut previous = self.partial.last().copied().unwrap_or(0);
        for (at, &byte) in input.iter().enumerate() {
            let length = before + at + 1;
            if length > MAX_COMMAND && length > self.limit(input, auth) {
                self.partial = Vec::new();
                return (at + 1, Some(Line::TooLong));
            }
            if length == 2 && previous == 0x16 && byte == 0x03 {
                let after_cr = false;
                self.partial = Vec::new();
                self.swallow = Some(Swallow { length, after_cr });
                return (at + 1, Some(Line::ClientHello));
            }
            let after_cr = previous == b'\r' && length > 1;
            if byte == b'\n' && after_cr {
                return (at + 1, Some(Line::Complete(self.complete(&input[..=at]))));
            }
            if byte == b'\n' || byte == 0 || after_cr {
                self.partial = Vec::new();
                let after_cr = byte == b'\r';
                self.swallow = Some(Swallow { length, after_cr });
                return (at + 1, Some(Line::BareControl));
            }
            previous = byte;
        }
        self.partial.extend_from_slice(input);
        (input.len(), None)
    }

    fn complete<'a>(&mut self, end: &'a [u8]) -> Cow<'a, [u8]> {
        if self.partial.is_empty() {
            return Cow::Borrowed(&end[..end.len() - 2]);
        }
        let mut line = std::mem::take(&mut self.partial);
        line.extend_from_slice(end);
        line.truncate(line.len() - 2);
        Cow::Owned(line)
    }

    fn limit(&self, input: &[u8], auth: bool) -> usize {
        let verb = self.partial.iter().chain(input).take(5);
        let is_auth = || verb.map(u8::to_ascii_uppercase).eq(*b"AUTH ");
        if auth || is_auth() {
            MAX_AUTH
        } else {
            MAX_COMMAND
        }
    }

    fn swallow(&mut self, input: &[u8]) -> Swallowed {
        let Some(mut swallow) = self.swallow else {
            return Swallowed::None;
        };
        for (at, &byte) in input.iter().enumerate() {
            if byte == b'\n' && swallow.after_cr {
                self.swallow = None;
                return Swallowed::Line(at + 1);
            }
            swallow.after_cr = byte == b'\r';
            swallow.length += 1;
            if swallow.length > MAX_COMMAND {
                return Swallowed::TooLong;
            }
        }
        self.swallow = Some(swallow);
        Swallowed::All
    }
}

enum Swallowed {
    None,
    Line(usize),
    All,
    TooLong,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(parts: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                let (taken, line) = lines.next(rest, false);
                rest = &rest[taken..];
                match line {
                    None => {}
                    Some(Line::Complete(line)) => found.push(line.escape_ascii().to_string()),
                    Some(Line::TooLong) => {
                        found.push("too long".into());
                        return found;
                    }
                    Some(other) => found.push(format!("{other:?}")),
                }
            }
        }
        found
    }

    #[test]
    fn only_crlf_ends_a_line() {
        assert_eq!(all(&[b"NOOP\r\nQUIT\r\n"]), ["NOOP", "QUIT"]);
        assert_eq!(all(&[b"\r\n"]), [""]);
        for bad in [
            &b"NOOP\nRSET\r\nQUIT\r\n"[..],
            b"NOOP\rRSET\r\nQUIT\r\n",
            b"NO\0OP\r\nQUIT\r\n",
        ] {
            assert_eq!(
                all(&[bad]),
                ["BareControl", "QUIT"],
                "{}",
                bad.escape_ascii()
            );
        }
        assert_eq!(all(&[b"A\r\r\nB\r\n"]), ["BareControl", "B"]);
        assert_eq!(all(&[b"A\n\n\n\r\nB\r\n"]), ["BareControl", "B"]);
        assert_eq!(all(&[b"\nB\r\nC\r\n"]), ["BareControl", "C"]);
    }

    #[test]
    fn cut_anywhere_is_the_same() {
        for stream in [
            &b"EHLO a\r\nX\nY\r\rZ\r\nNOOP\r\n"[..],
            b"a\0b\r\r\nQUIT\r\n",
            b"\x16\x02\r\nx\r\n",
            b"\x16\x03\x16\x03\x01\r\nNOOP\r\n",
        ] {
            let whole = all(&[stream]);
            for cut in 0..stream.len() {
                assert_eq!(
                    all(&[&stream[..cut], &stream[cut..]]),
                    whole,
                    "cut at {cut}"
                );
            }
        }
    }

    #[test]
    fn a_client_hello_is_recognised_byte_by_byte() {
        assert_eq!(all(&[b"\x16\x03"]), ["ClientHello"]);
        assert_eq!(all(&[b"\x16", b"\x03"]), ["ClientHello"]);
        assert_eq!(all(&[b"NOOP\r\n\x16\x03"]), ["NOOP", "ClientHello"]);
    }

    #[test]
    fn lengths_are_bounded() {
        let fits = [&[b'a'; MAX_COMMAND - 2][..], b"\r\n"].concat();
        assert_eq!(all(&[&fits])[0].len(), MAX_COMMAND - 2);
        assert_eq!(all(&[&[b'a'; MAX_COMMAND + 1]]), ["too long"]);
        let auth = [&b"auth PLAIN "[..], &[b'a'; MAX_AUTH - 13], b"\r\n"].concat();
        assert_eq!(all(&[&auth])[0].len(), MAX_AUTH - 2);
        assert_eq!(all(&[&auth[..3000], &auth[3000..]])[0].len(), MAX_AUTH - 2);
        assert_eq!(all(&[b"AUTH ", &[b'a'; MAX_AUTH]]), ["too long"]);
        assert_eq!(
            all(&[b"a\n", &[b'\n'; MAX_COMMAND]]),
            ["BareControl", "too long"]
        );
    }
}
