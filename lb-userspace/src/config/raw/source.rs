//! Where connections come from, when, and how often: `source`, `schedule`, `connection_rate`.

use std::net::IpAddr;

use jiff::tz::TimeZone;
use toml::de::DeValue;

use crate::{
    config::{
        diagnostic::{Faults, quoted},
        reader::{At, Field, Section},
    },
    model::policy::{Range, Rate, Schedule},
};

/// Why an entry of a source list is none: continues `"…" …`.
pub(in crate::config) type NoSource = &'static str;

/// Reads one address, prefix `a/length` or range `a-b`.
///
/// # Errors
///
/// What is wrong with it.
pub(in crate::config) fn range(text: &str) -> Result<Range, NoSource> {
    if let Some((address, length)) = text.split_once('/') {
        let address = address.parse().map_err(|_| "is no prefix")?;
        let length = length.parse().map_err(|_| "has no prefix length")?;
        let most = if plain(address)?.is_ipv4() { 32 } else { 128 };
        if length > most {
            return Err("has a prefix length that is too long");
        }
        return Ok(Range::prefix(address, length));
    }
    if let Some((first, last)) = text.split_once('-') {
        let parse = |text: &str| text.trim().parse().map_err(|_| "is no range of addresses");
        let (first, last) = (plain(parse(first)?)?, plain(parse(last)?)?);
        if first.is_ipv4() != last.is_ipv4() {
            return Err("goes from one address family to the other");
        }
        if first > last {
            return Err("ends before it begins");
        }
        return Ok(Range::new(first, last));
    }
    let address = plain(text.parse().map_err(|_| "is no address, prefix or range")?)?;
    Ok(Range::new(address, address))
}

/// Both planes carry IPv4 in the mapped shape; two spellings of one address would go unnoticed.
fn plain(address: IpAddr) -> Result<IpAddr, NoSource> {
    match address {
        IpAddr::V6(six) if six.to_ipv4_mapped().is_some() => {
            Err("is an IPv4 address in IPv6 spelling")
        }
        address => Ok(address),
    }
}

/// `source`: one text or a list of texts, each with one entry or several with spaces between.
pub(super) fn read(section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<Vec<Range>> {
    list(
        "source",
        "source = [\"198.51.100.0/24\", \"192.0.2.10-192.0.2.20\"]",
        "Remove the key to match every source, or set `enabled = false`.",
        section,
        faults,
    )
}

/// Addresses, prefixes and ranges under any key; `instead`: what to do in place of an empty list.
pub(super) fn list(
    key: &'static str,
    example: &str,
    instead: &str,
    section: &mut Section<'_, '_>,
    faults: &mut Faults,
) -> Field<Vec<Range>> {
    let texts = match section.value(key).map(|value| value.get_ref()) {
        Some(DeValue::String(_)) => section
            .string(key, example, faults)
            .and_then(|text| Some(vec![text])),
        _ => section.strings(key, example, faults),
    };
    texts.and_then(|texts| {
        let mut ranges = Vec::new();
        let mut good = true;
        for text in &texts.value {
            for entry in text.value.split_whitespace() {
                match range(entry) {
                    Ok(range) => ranges.push(range),
                    Err(fault) => {
                        good = false;
                        faults.error(
                            text.at,
                            &section.object,
                            format!("has the {key} {}, which {fault}", quoted(entry)),
                            "It would match nothing, or too much.",
                            "Write an address, a prefix like \"198.51.100.0/24\" or a range like \"192.0.2.10-192.0.2.20\".",
                        );
                    }
                }
            }
        }
        if good && ranges.is_empty() {
            faults.error(
                texts.at,
                &section.object,
                format!("has an empty {key}"),
                "It would match nothing.",
                instead,
            );
            good = false;
        }
        good.then_some(ranges)
    })
}

/// Days as they are written, Monday first.
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
/// Every minute of a day.
const ALL_DAY: (u16, u16) = (0, 24 * 60);

/// `schedule = { days = [...], times = [...], timezone = "..." }`.
pub(super) fn schedule(section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<Schedule> {
    let example = "schedule = { days = [\"mon-fri\"], times = [\"08:00-18:00\"], timezone = \"Europe/Berlin\" }";
    section.table("schedule", example, faults).and_then(|found| {
        let mut section = found.value;
        let days = section.strings("days", "days = [\"mon-fri\", \"sun\"]", faults);
        let days = read_all(days, &section.object, faults, days_of, "day or range of days", "\"mon\" or \"mon-fri\"");
        let times = section.strings("times", "times = [\"08:00-18:00\"]", faults);
        let times = read_all(times, &section.object, faults, time_of, "time of day", "\"08:00-18:00\" or \"22:00-06:00\"");
        let zone = section.string("timezone", "timezone = \"Europe/Berlin\"", faults).and_then(|given| {
            let zone = match given.value {
                "UTC" => Some(TimeZone::UTC),
                name => TimeZone::get(name).ok(),
            };
            if zone.is_none() {
                faults.error(
                    given.at,
                    &section.object,
                    format!("has an unknown timezone {}", quoted(given.value)),
                    "Its times would have no meaning.",
                    "Write \"UTC\", or a name from the system's time zone database like \"Europe/Berlin\".",
                );
            }
            zone
        });
        let zone = section.required(
            zone,
            "timezone",
            "Its times would mean another hour on another box.",
            "timezone = \"UTC\"",
            faults,
        );
        section.finish(faults);
        let days = days.or(vec![0x7f])?.into_iter().fold(0, |all, day| all | day);
        let mut times = times.or(vec![ALL_DAY])?;
        times.sort_unstable();
        Some(Schedule { days, times, zone: zone.get()?.clone() })
    })
}

/// Reads each text of a list, which must not be empty.
fn read_all<T>(
    texts: Field<Vec<At<&str>>>,
    object: &str,
    faults: &mut Faults,
    read: fn(&str) -> Option<T>,
    what: &str,
    example: &str,
) -> Field<Vec<T>> {
    texts.and_then(|texts| {
        if texts.value.is_empty() {
            faults.error(
                texts.at,
                object,
                format!("names no {what}"),
                "It would never match.",
                "Remove the key to mean all of them, or set `enabled = false`.",
            );
            return None;
        }
        let mut all = Vec::with_capacity(texts.value.len());
        for text in &texts.value {
            match read(text.value) {
                Some(value) => all.push(value),
                None => faults.error(
                    text.at,
                    object,
                    format!("has {}, which is no {what}", quoted(text.value)),
                    "smtplb would have to guess what is meant.",
                    format!("Write for example {example}."),
                ),
            }
        }
        (all.len() == texts.value.len()).then_some(all)
    })
}

/// The bits of `mon` or `fri-mon`.
fn days_of(text: &str) -> Option<u8> {
    let day = |text: &str| DAYS.iter().position(|day| *day == text);
    match text.split_once('-') {
        None => day(text).map(|day| 1 << day),
        Some((first, last)) => {
            let (first, last) = (day(first)?, day(last)?);
            let count = (last + 7 - first) % 7;
            Some((0..=count).fold(0, |bits, step| bits | 1 << ((first + step) % 7)))
        }
    }
}

/// The minutes of `08:00-18:00`.
fn time_of(text: &str) -> Option<(u16, u16)> {
    let minute = |text: &str| {
        let (hour, minute) = text.split_once(':')?;
        let digits = |text: &str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(hour) || !digits(minute) {
            return None;
        }
        let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
        (minute < 60 && hour * 60 + minute <= ALL_DAY.1).then_some(hour * 60 + minute)
    };
    let (from, to) = text.split_once('-')?;
    let (from, to) = (minute(from)?, minute(to)?);
    (from < ALL_DAY.1).then_some((from, to))
}

/// Highest rate and burst.
const MOST: u32 = 1_000_000;

/// `connection_rate = { per_source = "50/s", burst = 100 }`.
pub(super) fn rate(section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<Rate> {
    let example = "connection_rate = { per_source = \"50/s\", burst = 100 }";
    section
        .table("connection_rate", example, faults)
        .and_then(|found| {
            let mut section = found.value;
            let per_source =
                section
                    .string("per_source", "per_source = \"50/s\"", faults)
                    .and_then(|given| {
                        let read = per(given.value);
                        if read.is_none() {
                            faults.error(
                    given.at,
                    &section.object,
                    format!("has per_source = {}, which is no rate", quoted(given.value)),
                    format!("A rate is a whole number from 1 to {MOST} and one of /s, /m, /h."),
                    "Write for example `per_source = \"50/s\"`.",
                );
                        }
                        read
                    });
            let per_source = section.required(
                per_source,
                "per_source",
                "It would limit nothing.",
                "per_source = \"50/s\"",
                faults,
            );
            let burst = section.integer("burst", 1..=MOST, "burst = 100", faults);
            section.finish(faults);
            let (count, period) = *per_source.get()?;
            Some(Rate {
                interval: (period / u64::from(count)).max(1),
                burst: burst.or(count)?,
            })
        })
}

/// How many, in how many nanoseconds.
fn per(text: &str) -> Option<(u32, u64)> {
    let (count, unit) = text.split_once('/')?;
    let seconds: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return None,
    };
    let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
    let count = count
        .parse()
        .ok()
        .filter(|count| digits && (1..=MOST).contains(count))?;
    Some((count, seconds * 1_000_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_every_kind_are_read() {
        let ends =
            |first: &str, last: &str| Ok(Range::new(first.parse().unwrap(), last.parse().unwrap()));
        assert_eq!(range("192.0.2.1"), ends("192.0.2.1", "192.0.2.1"));
        assert_eq!(range("192.0.2.9/24"), ends("192.0.2.0", "192.0.2.255"));
        assert_eq!(
            range("192.0.2.10-192.0.2.20"),
            ends("192.0.2.10", "192.0.2.20")
        );
        assert_eq!(range("2001:db8::/127"), ends("2001:db8::", "2001:db8::1"));
        assert_eq!(
            range("2001:db8::1-2001:db8::9"),
            ends("2001:db8::1", "2001:db8::9")
        );
        for wrong in [
            "",
            "mail.example.org",
            "192.0.2.1/33",
            "2001:db8::/129",
            "192.0.2.1/",
            "192.0.2.9-192.0.2.1",
            "192.0.2.1-2001:db8::1",
            "::ffff:192.0.2.1",
            "192.0.2.1:25",
            "192.0.2.1-",
            "1.2.3.4/24/8",
            "::ffff:1.2.3.4/120",
        ] {
            assert!(range(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn days_and_times_are_read() {
        assert_eq!(days_of("mon"), Some(1));
        assert_eq!(days_of("mon-fri"), Some(0b001_1111));
        assert_eq!(days_of("sat-mon"), Some(0b110_0001));
        assert_eq!(days_of("monday"), None);
        assert_eq!(time_of("08:00-18:30"), Some((480, 1110)));
        assert_eq!(time_of("22:00-06:00"), Some((1320, 360)));
        assert_eq!(time_of("00:00-24:00"), Some(ALL_DAY));
        for wrong in [
            "8-18",
            "08:00",
            "08:60-09:00",
            "24:00-01:00",
            "25:00-26:00",
            "+8:00-09:00",
        ] {
            assert_eq!(time_of(wrong), None, "{wrong:?}");
        }
        assert_eq!(per("50/s"), Some((50, 1_000_000_000)));
        assert_eq!(per("1/h"), Some((1, 3_600_000_000_000)));
        for wrong in [
            "50",
            "50/",
            "0/s",
            "/s",
            "1.5/s",
            "50/d",
            "+5/s",
            "1000001/s",
            "5 /s",
        ] {
            assert_eq!(per(wrong), None, "{wrong:?}");
        }
    }
}
