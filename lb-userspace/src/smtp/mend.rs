//! `line_endings = "normalize"`: content with bare CRs and LFs becomes lines that every member reads alike.

use super::body::{At, Body, Found, Scan};

/// Most bytes mended at once, each into two at most: what waits for the member stays bounded.
const MOST: usize = 16 * 1024;

impl Body {
    /// Looks at the next piece as [`Body::scan`] does, and writes to `out` what goes on in its place.
    ///
    /// CRLF.CRLF as it came ends the content, and nothing that is written here does: a LF, and a LF behind several CRs,
    /// becomes CRLF, CRs elsewhere a space, and a dot that could be taken for the end is doubled. NUL cannot be mended.
    /// It goes on where a scan has stopped, and a scan goes on behind it; a CR that is held goes first in either.
    pub fn mend(&mut self, piece: &[u8], out: &mut Vec<u8>) -> Scan {
        let piece = &piece[..piece.len().min(MOST)];
        for (at, &byte) in piece.iter().enumerate() {
            let found = self.mend_byte(byte, out);
            if found != Found::Nothing {
                return Scan {
                    used: at + 1,
                    clean: 0,
                    found,
                };
            }
        }
        Scan {
            used: piece.len(),
            clean: 0,
            found: Found::Nothing,
        }
    }

    fn mend_byte(&mut self, byte: u8, out: &mut Vec<u8>) -> Found {
        let mut at = self.at;
        let is_end = byte == b'\n' || byte == b'\r';
        if self.holds_cr() && !is_end {
            out.push(b' ');
            at = At::Text;
        }
        let (next, words): (At, &[u8]) = match (at, byte) {
            (_, 0) => {
                self.at = At::Text;
                return Found::BareControl;
            }
            (At::DotCr, b'\n') => (At::LineStart, b"\r\n"),
            (At::DotCrs, b'\n') => (At::LineStart, b".\r\n"),
            (At::TextCr, b'\n') => (At::LineStart, b"\r\n"),
            // The dot is out; a client that ends its line so has not doubled it.
            (At::Dot, b'\n') => (At::SoftStart, b".\r\n"),
            (_, b'\n') => (At::SoftStart, b"\r\n"),
            (At::Dot, b'\r') => (At::DotCr, b""),
            (At::DotCr | At::DotCrs, b'\r') => (At::DotCrs, b""),
            (_, b'\r') => (At::TextCr, b""),
            (At::LineStart, b'.') => (At::Dot, b"."),
            (At::SoftStart, b'.') => (At::SoftDot, b".."),
            // A client that ends lines by LF and doubles dots.
            (At::SoftDot, b'.') => (At::Text, b""),
            _ => (At::Text, &[byte]),
        };
        out.extend_from_slice(words);
        let ended = at == At::DotCr && byte == b'\n';
        self.at = next;
        if ended { Found::End } else { Found::Nothing }
    }
}
