//! SHA-256 over messages: of all of it, and of its body alone.
//!
//! A real mail server adds header lines, so there only the body can be compared.

use aws_lc_rs::digest::{Context, SHA256};

/// Hexadecimal SHA-256 of some bytes.
pub fn sha256(bytes: &[u8]) -> String {
    hex(aws_lc_rs::digest::digest(&SHA256, bytes).as_ref())
}

/// Takes a message line by line.
#[derive(Clone)]
pub struct MessageDigest {
    whole: Context,
    body: Context,
    in_body: bool,
    size: u64,
    head: Vec<u8>,
}

/// What a message came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// Of every byte.
    pub whole: String,
    /// Of what follows the empty line.
    pub body: String,
    /// Bytes.
    pub size: u64,
    /// The header.
    pub head: Vec<u8>,
}

impl MessageDigest {
    /// Headers beyond this are not kept, only counted.
    const HEAD: usize = 64 << 10;

    /// Of nothing yet.
    #[expect(
        clippy::new_without_default,
        reason = "a digest of nothing is no sensible default"
    )]
    pub fn new() -> Self {
        Self {
            whole: Context::new(&SHA256),
            body: Context::new(&SHA256),
            in_body: false,
            size: 0,
            head: Vec::new(),
        }
    }

    /// Takes the next line with its end, or any further piece once the body has begun.
    pub fn update(&mut self, line: &[u8]) {
        self.whole.update(line);
        self.size += line.len() as u64;
        if self.in_body {
            self.body.update(line);
            return;
        }
        self.in_body = line == b"\r\n";
        if !self.in_body && self.head.len() < Self::HEAD {
            self.head.extend_from_slice(line);
        }
    }

    /// Whether the empty line has been seen.
    pub fn in_body(&self) -> bool {
        self.in_body
    }

    /// All of it.
    pub fn finish(self) -> Digest {
        Digest {
            whole: hex(self.whole.finish().as_ref()),
            body: hex(self.body.finish().as_ref()),
            size: self.size,
            head: self.head,
        }
    }
}

/// Of a message that is all there.
pub fn of_message(text: &[u8]) -> Digest {
    let mut digest = MessageDigest::new();
    let mut rest = text;
    while !digest.in_body() && !rest.is_empty() {
        let end = rest
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(rest.len(), |at| at + 1);
        digest.update(&rest[..end]);
        rest = &rest[end..];
    }
    digest.update(rest);
    digest.finish()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_standard_vector() {
        // FIPS 180-4, the example "abc".
        assert!(sha256(b"abc").starts_with("ba7816bf8f01cfea"));
    }

    #[test]
    fn the_body_starts_behind_the_empty_line() {
        let digest = of_message(b"A: b\r\n\r\nbody\r\n\r\nmore\r\n");
        assert_eq!(digest.body, sha256(b"body\r\n\r\nmore\r\n"));
        assert_eq!(digest.whole, sha256(b"A: b\r\n\r\nbody\r\n\r\nmore\r\n"));
        assert_eq!(digest.head, b"A: b\r\n");
        assert_eq!(digest.size, 22);
    }
}
