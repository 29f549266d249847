//! The content behind DATA: where it ends, and that it holds no byte a member could take for an end.

/// Follows the content of one message.
///
/// CRLF.CRLF ends it (RFC 5321 §4.1.1.4) and nothing else does. A CR without LF, a LF without CR and
/// NUL (RFC 5321 §2.3.8) are reported before the byte is let through, so that a member with laxer
/// rules sees the same one message; [`Body::mend`] makes lines of what can be made lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Body {
    pub(super) at: At,
}

/// The place between two bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum At {
    /// Behind CRLF; DATA's own CRLF counts.
    #[default]
    LineStart,
    /// Behind a dot that starts a line.
    Dot,
    /// Behind such a dot and CR.
    DotCr,
    /// Within a line.
    Text,
    /// Behind a CR within a line.
    TextCr,
    /// Behind a bare LF that became CRLF.
    SoftStart,
    /// Behind a dot there, which was doubled.
    SoftDot,
    /// Behind a dot that starts a line behind CRLF, and several CRs.
    DotCrs,
}

/// What a piece of content turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scan {
    /// How many bytes of the piece were looked at.
    pub used: usize,
    /// How many of these may go on now. A CR at the end waits for the next byte.
    pub clean: usize,
    /// What ended the look.
    pub found: Found,
}

/// What ended a look at a piece of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The end of the piece.
    Nothing,
    /// The end of data.
    End,
    /// A bare CR, a bare LF or NUL.
    BareControl,
}

impl Body {
    /// Looks at the next piece.
    ///
    /// Where [`Body::holds_cr`] was true before, that CR goes first.
    pub fn scan(&mut self, piece: &[u8]) -> Scan {
        let mut used = 0;
        while used < piece.len() {
            let block = &piece[used..piece.len().min(used + BLOCK)];
            if self.skip(block) {
                used += block.len();
                continue;
            }
            for &byte in block {
                used += 1;
                match self.step(byte) {
                    Found::Nothing => {}
                    Found::End => {
                        return Scan {
                            used,
                            clean: used,
                            found: Found::End,
                        };
                    }
                    Found::BareControl => {
                        return Scan {
                            used,
                            clean: 0,
                            found: Found::BareControl,
                        };
                    }
                }
            }
        }
        let clean = used - usize::from(used > 0 && self.holds_cr());
        Scan {
            used,
            clean,
            found: Found::Nothing,
        }
    }

    /// Looks for the end of data only; returns how many bytes belong to the content.
    pub fn discard(&mut self, piece: &[u8]) -> (usize, bool) {
        for (at, &byte) in piece.iter().enumerate() {
            if self.step(byte) == Found::End {
                return (at + 1, true);
            }
        }
        (piece.len(), false)
    }

    /// Was the last byte a CR that waits for its LF?
    pub fn holds_cr(&self) -> bool {
        matches!(self.at, At::DotCr | At::TextCr | At::DotCrs)
    }

    /// Passes a whole block when nothing in it needs a closer look.
    ///
    /// Every pair of neighbours is judged without branches, which the compiler turns into vectors:
    /// most content is passed here at memory speed.
    fn skip(&mut self, block: &[u8]) -> bool {
        let before = match self.at {
            At::LineStart => b'\n',
            At::Text => b'x',
            At::TextCr => b'\r',
            At::Dot | At::DotCr | At::SoftStart | At::SoftDot | At::DotCrs => return false,
        };
        let (Some(&first), Some(&last)) = (block.first(), block.last()) else {
            return true;
        };
        let ones = block[..block.len() - 1].as_chunks::<LANES>();
        let twos = block[1..].as_chunks::<LANES>();
        let mut look = [0; LANES];
        for (one, two) in ones.0.iter().zip(twos.0) {
            for lane in 0..LANES {
                look[lane] |= suspicious(one[lane], two[lane]);
            }
        }
        let rest = ones.1.iter().zip(twos.1);
        let rest = rest.fold(suspicious(before, first), |look, (&one, &two)| {
            look | suspicious(one, two)
        });
        let look = look.into_iter().fold(rest, |look, lane| look | lane);
        if look == 0 {
            self.at = match last {
                b'\n' => At::LineStart,
                b'\r' => At::TextCr,
                _ => At::Text,
            };
        }
        look == 0
    }

    fn step(&mut self, byte: u8) -> Found {
        let (next, found) = match (self.at, byte) {
            (At::SoftStart | At::SoftDot | At::DotCrs, _) => (At::Text, Found::BareControl),
            (At::DotCr, b'\n') => (At::LineStart, Found::End),
            (At::TextCr, b'\n') => (At::LineStart, Found::Nothing),
            (At::DotCr | At::TextCr, b'\r') => (At::TextCr, Found::BareControl),
            (At::DotCr | At::TextCr, _) | (_, b'\n' | 0) => (At::Text, Found::BareControl),
            (At::LineStart, b'.') => (At::Dot, Found::Nothing),
            (At::Dot, b'\r') => (At::DotCr, Found::Nothing),
            (At::LineStart | At::Text, b'\r') => (At::TextCr, Found::Nothing),
            (At::LineStart | At::Dot | At::Text, _) => (At::Text, Found::Nothing),
        };
        self.at = next;
        found
    }
}

/// Bytes judged at once: small enough that one dotted line costs little.
const BLOCK: usize = 1024;
/// Pairs judged side by side.
const LANES: usize = 32;

/// Not zero where a pair of neighbours breaks CRLF, is NUL, or may begin the end of data.
#[inline(always)]
fn suspicious(one: u8, two: u8) -> u8 {
    let half_crlf = u8::from(one == b'\r') ^ u8::from(two == b'\n');
    half_crlf | u8::from(two == 0) | (u8::from(one == b'\n') & u8::from(two == b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What gets through when the content arrives in these pieces, and what ended it.
    fn through(pieces: &[&[u8]]) -> (Vec<u8>, Found, usize) {
        let mut body = Body::default();
        let (mut out, mut used) = (Vec::new(), 0);
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            let held = body.holds_cr();
            let scan = body.scan(piece);
            used += scan.used;
            if scan.found != Found::BareControl {
                out.extend(held.then_some(b'\r'));
                out.extend_from_slice(&piece[..scan.clean]);
            }
            if scan.found != Found::Nothing {
                return (out, scan.found, used);
            }
        }
        (out, Found::Nothing, used)
    }

    #[test]
    fn only_crlf_dot_crlf_ends() {
        for (content, length) in [
            (&b".\r\nQUIT\r\n"[..], 3),
            (b"a\r\n.\r\nQUIT", 6),
            (b"..\r\n.\r\n", 7),
            (b".a\r\n.\r\n", 7),
            (b"a.\r\n\r\n.\r\n", 9),
        ] {
            let (out, found, used) = through(&[content]);
            assert_eq!(
                (found, used),
                (Found::End, length),
                "{}",
                content.escape_ascii()
            );
            assert_eq!(out, &content[..length]);
        }
    }

    #[test]
    fn every_look_alike_is_reported() {
        for content in [
            &b"a\n.\n"[..],
            b"a\n.\r\n",
            b"a\r\n.\n",
            b"a\r.\r",
            b"a\r\n.\rMAIL",
            b"a\r\n\0.\r\n",
            b"a\r\n.\0\r\n",
            b"a\r\n.\r\0\n",
            b"a\r\r\n.\r\n",
            b"a\r\n.\r\r\n",
            b"\n.\r\n",
        ] {
            let (out, found, _) = through(&[content]);
            assert_eq!(found, Found::BareControl, "{}", content.escape_ascii());
            assert_eq!(out, b"");
            for cut in 1..content.len() {
                let (out, found, _) = through(&[&content[..cut], &content[cut..]]);
                assert_eq!(found, Found::BareControl);
                let crs = out.iter().filter(|byte| **byte == b'\r').count();
                let crlfs = out.windows(2).filter(|pair| pair == b"\r\n").count();
                let lfs = out.iter().filter(|byte| **byte == b'\n').count();
                assert!(
                    crs == crlfs && lfs == crlfs && !out.contains(&0),
                    "a bare byte got through"
                );
            }
        }
    }

    #[test]
    fn cut_anywhere_is_the_same() {
        let mut content = Vec::new();
        for line in 0..60 {
            content.extend_from_slice(
                format!("line {line} \u{fc} {}\r\n", "x".repeat(line)).as_bytes(),
            );
            if line % 7 == 0 {
                content.extend_from_slice(b"..\r\n\r\n.x\r\n");
            }
        }
        content.extend_from_slice(b".\r\nbehind");
        let whole = through(&[&content]);
        assert_eq!((whole.1, whole.2), (Found::End, content.len() - 6));
        for cut in 1..content.len() {
            assert_eq!(
                through(&[&content[..cut], &content[cut..]]),
                whole,
                "cut at {cut}"
            );
        }
        let bytes: Vec<&[u8]> = content.chunks(1).collect();
        assert_eq!(through(&bytes), whole);
    }

    #[test]
    fn discarding_finds_the_true_end_only() {
        let mut body = Body::default();
        let content = b"a\n.\nMAIL FROM:<x>\r.\r\nb\r\n.\r\nQUIT\r\n";
        assert_eq!(body.discard(content), (content.len() - 6, true));
    }
}
