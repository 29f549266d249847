//! Messages: made from a seed, so that both ends of a test know every byte.

pub mod digest;
pub mod random;
mod text;

pub use self::random::Random;
use self::text::Text;

/// How large messages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// All of this many bytes.
    Exactly(usize),
    /// As mail is: most of a few kB, some of hundreds, few of MB, two in a thousand up to 25 MB.
    Mixed,
    /// As [`Self::Mixed`], but not above this.
    MixedUpTo(usize),
}

/// The largest message of [`Sizes::Mixed`].
pub const LARGEST: usize = 25_000_000;

impl std::str::FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "mixed" {
            return Ok(Self::Mixed);
        }
        text.parse()
            .map(Self::Exactly)
            .map_err(|_| format!("`{text}` is neither `mixed` nor a number of bytes"))
    }
}

/// One message, not yet written out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Unique; stands in the Message-ID.
    pub id: String,
    /// Bytes, header and body together.
    pub size: usize,
    seed: u64,
}

impl Message {
    /// Message `number` of a run: the same run, number and seed give the same bytes.
    pub fn new(run: &str, number: usize, sizes: Sizes, seed: u64) -> Self {
        let mut random = Random::new(seed ^ (number as u64).wrapping_mul(0x9e37_79b9));
        let size = match sizes {
            Sizes::Exactly(size) => size,
            // The extremes are always among them: the first two of each thousand.
            Sizes::Mixed if number.is_multiple_of(1000) => LARGEST,
            Sizes::Mixed if number % 1000 == 1 => 1_000,
            Sizes::Mixed => mixed(&mut random, number),
            Sizes::MixedUpTo(limit) => mixed(&mut random, number).min(limit),
        };
        Self {
            id: format!("{run}-{number}"),
            size,
            seed: random.next(),
        }
    }

    /// Every byte of it: header, empty line, body; lines end in CRLF.
    pub fn text(&self) -> Vec<u8> {
        let header = format!(
            "Message-ID: <{}@lab.example>\r\nFrom: <sender@lab.example>\r\nTo: <inbox@lab.example>\r\n\
             Subject: {} bytes\r\nDate: Thu, 01 Jan 2026 00:00:00 +0000\r\n\r\n",
            self.id, self.size
        );
        let mut bytes = header.into_bytes();
        Text::new(self.seed).fill(&mut bytes, self.size);
        bytes
    }
}

fn mixed(random: &mut Random, number: usize) -> usize {
    let between = |random: &mut Random, low: usize, high: usize| low + random.below(high - low);
    match number % 1000 {
        500 => between(random, 5_000_000, LARGEST),
        part if part % 100 == 50 => between(random, 500_000, 5_000_000),
        part if part % 20 == 10 => between(random, 20_000, 500_000),
        _ => between(random, 1_000, 20_000),
    }
}

/// The id in a message's header.
pub fn id_of(text: &[u8]) -> Option<String> {
    let header = String::from_utf8_lossy(header_of(text));
    let line = header.lines().find_map(|line| {
        line.to_ascii_lowercase()
            .starts_with("message-id:")
            .then(|| line["message-id:".len()..].trim().to_owned())
    })?;
    let id = line.trim_start_matches('<').trim_end_matches('>');
    Some(id.split('@').next().unwrap_or(id).to_owned())
}

/// What stands before the empty line.
pub fn header_of(text: &[u8]) -> &[u8] {
    let end = text.windows(4).position(|four| four == b"\r\n\r\n");
    &text[..end.unwrap_or(text.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_the_same_every_time_and_as_long_as_it_says() {
        for size in [400, 1_000, 20_001, 300_000] {
            let message = Message::new("run", 7, Sizes::Exactly(size), 1);
            let text = message.text();
            assert_eq!(text.len(), size);
            assert!(text == message.text());
            assert!(text.ends_with(b"\r\n"));
            assert_eq!(id_of(&text).as_deref(), Some("run-7"));
        }
        let other = Message::new("run", 7, Sizes::Exactly(1_000), 2);
        assert!(other.text() != Message::new("run", 7, Sizes::Exactly(1_000), 1).text());
    }

    #[test]
    fn no_line_is_longer_than_smtp_allows_and_none_ends_bare() {
        let text = Message::new("run", 3, Sizes::Exactly(200_000), 5).text();
        let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
        assert!(
            lines
                .iter()
                .all(|line| line.ends_with(b"\r\n") && line.len() <= 1000)
        );
        assert!(
            lines.iter().any(|line| line.starts_with(b".")),
            "dots have to be stuffed somewhere"
        );
        assert!(lines.iter().any(|line| line.len() > 900));
        assert_eq!(
            text.iter().filter(|byte| **byte == b'\r').count(),
            lines.len()
        );
    }

    #[test]
    fn mixed_sizes_span_the_range_but_stay_affordable() {
        let sizes: Vec<usize> = (0..1000)
            .map(|number| Message::new("run", number, Sizes::Mixed, 9).size)
            .collect();
        assert_eq!(sizes.iter().max(), Some(&LARGEST));
        assert_eq!(sizes.iter().min(), Some(&1_000));
        assert!(sizes.iter().sum::<usize>() < 120_000_000);
    }
}
