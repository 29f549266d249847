//! Quantities with units.

use std::time::Duration;

/// Shortest accepted duration: below it a box would be busy with its own timers.
pub(super) const SHORTEST: Duration = Duration::from_millis(10);
/// Longest accepted duration; also keeps sums of instants far from overflow.
pub(super) const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Units of time, in milliseconds.
const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

/// Why a text is no duration: continues `... = "…" …`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoDuration {
    /// A bare number.
    NoUnit,
    /// Anything else that does not read `number unit`.
    Unreadable,
    /// Below [`SHORTEST`].
    TooShort,
    /// Above [`LONGEST`].
    TooLong,
}

/// Reads `200ms`, `30s`, `5m`, `1h`.
pub(super) fn duration(text: &str) -> Result<Duration, NoDuration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(NoDuration::Unreadable);
    }
    if unit.is_empty() {
        return Err(NoDuration::NoUnit);
    }
    let (_, scale) = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(NoDuration::Unreadable)?;
    // Only a number of more than 64 bits fails here.
    let milliseconds = number
        .parse::<u64>()
        .map_or(u64::MAX, |number| number.saturating_mul(*scale));
    match Duration::from_millis(milliseconds) {
        duration if duration < SHORTEST => Err(NoDuration::TooShort),
        duration if duration > LONGEST => Err(NoDuration::TooLong),
        duration => Ok(duration),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit_and_stay_in_bounds() {
        let cases = [
            ("200ms", Ok(Duration::from_millis(200))),
            ("30s", Ok(Duration::from_secs(30))),
            ("5m", Ok(Duration::from_secs(300))),
            ("1h", Ok(Duration::from_secs(3600))),
            ("24h", Ok(LONGEST)),
            ("10ms", Ok(SHORTEST)),
            ("30", Err(NoDuration::NoUnit)),
            ("", Err(NoDuration::Unreadable)),
            ("s", Err(NoDuration::Unreadable)),
            ("-1s", Err(NoDuration::Unreadable)),
            ("1.5s", Err(NoDuration::Unreadable)),
            ("1 s", Err(NoDuration::Unreadable)),
            ("1S", Err(NoDuration::Unreadable)),
            ("1h30m", Err(NoDuration::Unreadable)),
            ("٣s", Err(NoDuration::Unreadable)),
            ("1d", Err(NoDuration::Unreadable)),
            ("0s", Err(NoDuration::TooShort)),
            ("9ms", Err(NoDuration::TooShort)),
            ("25h", Err(NoDuration::TooLong)),
            ("18446744073709551615h", Err(NoDuration::TooLong)),
            ("99999999999999999999999s", Err(NoDuration::TooLong)),
        ];
        for (text, expected) in cases {
            assert_eq!(duration(text), expected, "{text:?}");
        }
    }
}
