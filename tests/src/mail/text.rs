//! Bodies: printable lines of all lengths, some starting with dots.

use std::sync::LazyLock;

use super::Random;

/// Lines that bodies are cut from; making each body letter by letter would take longer than sending it.
static LINES: LazyLock<Vec<u8>> = LazyLock::new(lines);
const POOL: usize = 1 << 20;

/// A source of body text.
pub(super) struct Text {
    random: Random,
}

impl Text {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
        }
    }

    /// Appends lines until `bytes` is `size` long; the last line ends in CRLF too.
    pub(super) fn fill(&mut self, bytes: &mut Vec<u8>, size: usize) {
        bytes.reserve(size.saturating_sub(bytes.len()));
        // The last line is made to measure: at least its CRLF, at most 998 and CRLF.
        while size.saturating_sub(bytes.len()) > 1000 {
            let room = size - bytes.len() - 2;
            let start = line_start(self.random.below(POOL / 2));
            let end = (start + room).min(start + 1 + self.random.below(POOL / 4));
            let cut = LINES[start..end].iter().rposition(|byte| *byte == b'\n');
            match cut {
                Some(cut) => bytes.extend_from_slice(&LINES[start..=start + cut]),
                None => continue,
            }
        }
        let rest = size.saturating_sub(bytes.len());
        if rest >= 2 {
            let start = self.random.below(POOL / 2);
            let letters = LINES[start..].iter().filter(|byte| !b"\r\n".contains(byte));
            bytes.extend(letters.take(rest - 2));
            bytes.extend_from_slice(b"\r\n");
        }
    }
}

/// The start of the first line behind `at`.
fn line_start(at: usize) -> usize {
    let next = LINES[at..].iter().position(|byte| *byte == b'\n');
    at + next.map_or(0, |next| next + 1)
}

fn lines() -> Vec<u8> {
    const LETTERS: &[u8] =
        b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=.,:;!? ";
    let mut random = Random::new(0x6d61_696c);
    let mut text = Vec::with_capacity(POOL + 1000);
    while text.len() < POOL {
        let length = match random.below(50) {
            0 => 0,
            1 => 990 + random.below(9),
            _ => 20 + random.below(60),
        };
        // A line of a lone dot or with dots in front is what transparency (RFC 5321 §4.5.2) is for.
        let dots = if random.below(20) == 0 {
            1 + random.below(2)
        } else {
            0
        };
        text.extend(std::iter::repeat_n(b'.', dots));
        text.extend((dots..length).map(|_| LETTERS[random.below(LETTERS.len())]));
        text.extend_from_slice(b"\r\n");
    }
    text
}
