//! Policies: who may connect, and when.

use std::{fmt, net::IpAddr, path::PathBuf, sync::Arc};

use jiff::{Timestamp, tz::TimeZone};
pub use lb_common::access::Action;
use lb_common::{access, addr::Addr};

use super::Name;

/// What stands for connections that no rule of a policy matches, in listings and logs; no rule may be named so.
pub const DEFAULT_RULE: &str = "default";

/// `[policy.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The table's name.
    pub name: Name,
    /// What becomes of connections that no rule matches: [`Action::Accept`] or [`Action::Drop`].
    pub default: Action,
    /// Are those logged?
    pub log: bool,
    /// In order: the first that matches decides.
    pub rules: Vec<Rule>,
}

/// `[[policy.NAME.rule]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Unique in its policy.
    pub name: Name,
    /// A rule that is not never matches.
    pub enabled: bool,
    /// From where; sorted and disjoint. Every address where it names none.
    pub source: Arc<[Range]>,
    /// Where a part of these was read.
    pub source_file: Option<SourceFile>,
    /// On these VLANs only; empty: on any, and without a tag.
    pub vlans: Vec<u16>,
    /// On these interfaces only; empty: on any.
    pub interfaces: Vec<String>,
    /// When; absent: always.
    pub schedule: Option<Schedule>,
    /// What becomes of the connection.
    pub action: Action,
    /// Are matches logged?
    pub log: bool,
}

impl Policy {
    /// What becomes of a client whose address a header tells, and whose packets nobody has seen: rules with VLANs or
    /// interfaces are passed over.
    pub fn judge(&self, source: IpAddr, now: Timestamp) -> Action {
        let source = number(source);
        let mut rules = self
            .rules
            .iter()
            .filter(|rule| rule.enabled && rule.vlans.is_empty() && rule.interfaces.is_empty());
        rules
            .find(|rule| {
                let behind = rule.source.partition_point(|range| range.last < source);
                let found = rule.source.get(behind);
                found.is_some_and(|range| range.first <= source)
                    && rule
                        .schedule
                        .as_ref()
                        .is_none_or(|schedule| schedule.holds(now))
            })
            .map_or(self.default, |rule| rule.action)
    }
}

/// `rule.source_file`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// The file.
    pub path: PathBuf,
    /// What the rule names beside it; sorted and disjoint.
    pub beside: Arc<[Range]>,
}

impl Rule {
    /// Does it match everywhere and at all times, as far as its sources go?
    pub fn is_unconditional(&self) -> bool {
        self.vlans.is_empty() && self.interfaces.is_empty() && self.schedule.is_none()
    }

    /// Does it match wherever and whenever the other does?
    pub fn is_as_wide_as(&self, other: &Self) -> bool {
        fn holds<T: PartialEq>(wide: &[T], narrow: &[T]) -> bool {
            wide.is_empty() || (!narrow.is_empty() && narrow.iter().all(|item| wide.contains(item)))
        }
        holds(&self.vlans, &other.vlans)
            && holds(&self.interfaces, &other.interfaces)
            && (self.schedule.is_none() || self.schedule == other.schedule)
    }
}

/// Addresses from the first to the last, IPv4 as IPv4-mapped, in host order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// The first.
    pub first: u128,
    /// The last.
    pub last: u128,
}

impl Range {
    /// Every address of both families.
    pub const ALL: Self = Self {
        first: 0,
        last: u128::MAX,
    };

    /// From one address to another of the same family, the lower one first.
    pub fn new(first: IpAddr, last: IpAddr) -> Self {
        Self {
            first: number(first),
            last: number(last),
        }
    }

    /// The addresses that begin with the first `length` bits of an address, whatever its other bits.
    pub fn prefix(address: IpAddr, length: u8) -> Self {
        let width = if address.is_ipv4() { 32 } else { 128 };
        let host = u128::MAX
            .checked_shr(128 - u32::from(width.max(length) - length))
            .unwrap_or(0);
        let address = number(address);
        Self {
            first: address & !host,
            last: address | host,
        }
    }

    /// Sorted, and put together where they overlap or touch.
    pub fn merged(mut ranges: Vec<Self>) -> Vec<Self> {
        ranges.sort_unstable();
        let mut merged: Vec<Self> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.first <= last.last.saturating_add(1) => {
                    last.last = last.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        merged.shrink_to_fit();
        merged
    }
}

/// An address as a number, host order, IPv4 as IPv4-mapped.
pub fn number(address: IpAddr) -> u128 {
    let (high, low) = access::split(&Addr::from(address));
    u128::from(high) << 64 | u128::from(low)
}

/// `rule.schedule`.
#[derive(Clone, PartialEq, Eq)]
pub struct Schedule {
    /// A bit for each day of the week, Monday the lowest.
    pub days: u8,
    /// From minute to minute of the day, the second excluded; sorted. One that ends at or before its beginning goes on
    /// into the next day.
    pub times: Vec<(u16, u16)>,
    /// Whose clock.
    pub zone: TimeZone,
}

impl Schedule {
    /// Has it its time at this instant?
    pub fn holds(&self, now: Timestamp) -> bool {
        let now = now.to_zoned(self.zone.clone());
        let today = now.weekday().to_monday_zero_offset().unsigned_abs();
        let yesterday = (today + 6) % 7;
        let minute = now.hour().unsigned_abs() as u16 * 60 + now.minute().unsigned_abs() as u16;
        let on = |day: u8| self.days & 1 << day != 0;
        self.times.iter().any(|&(from, to)| {
            if from < to {
                on(today) && (from..to).contains(&minute)
            } else {
                (on(today) && minute >= from) || (on(yesterday) && minute < to)
            }
        })
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zone = self.zone.iana_name().unwrap_or("?");
        write!(f, "Schedule({:07b}, {:?}, {zone})", self.days, self.times)
    }
}

/// What guards a virtual server beside the policies of the network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guard {
    /// `policy`: in force.
    pub policy: Option<Name>,
    /// `staged_policy`: only counted.
    pub staged: Option<Name>,
    /// `connection_rate`.
    pub rate: Option<Rate>,
}

/// `virtual_server.connection_rate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Between two connections of a source at the allowed rate, nanoseconds; never 0.
    pub interval: u64,
    /// Connections at once after a time of silence; at least 1.
    pub burst: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Range {
        let (address, length) = text.split_once('/').unwrap();
        Range::prefix(address.parse().unwrap(), length.parse().unwrap())
    }

    #[test]
    fn prefixes_become_ranges() {
        let ends =
            |first: &str, last: &str| Range::new(first.parse().unwrap(), last.parse().unwrap());
        assert_eq!(range("192.0.2.77/24"), ends("192.0.2.0", "192.0.2.255"));
        assert_eq!(range("0.0.0.0/0"), ends("0.0.0.0", "255.255.255.255"));
        assert_eq!(range("192.0.2.1/32"), ends("192.0.2.1", "192.0.2.1"));
        assert_eq!(
            range("2001:db8::/64"),
            ends("2001:db8::", "2001:db8::ffff:ffff:ffff:ffff")
        );
        assert_eq!(range("::/0"), Range::ALL);
        assert_eq!(range("::1/128"), ends("::1", "::1"));
    }

    #[test]
    fn ranges_that_touch_become_one() {
        let merged = Range::merged(vec![
            range("192.0.2.128/25"),
            range("192.0.2.0/25"),
            range("10.0.0.0/8"),
        ]);
        assert_eq!(merged, [range("10.0.0.0/8"), range("192.0.2.0/24")]);
        assert_eq!(
            Range::merged(vec![Range::ALL, range("10.0.0.0/8")]),
            [Range::ALL]
        );
    }

    #[test]
    fn a_schedule_follows_its_own_clock() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let weekdays = Schedule {
            days: 0b001_1111,
            times: vec![(8 * 60, 18 * 60)],
            zone: zone.clone(),
        };
        let holds = |schedule: &Schedule, text: &str| schedule.holds(text.parse().unwrap());
        // Wednesday; one hour before UTC in winter, two in summer.
        assert!(!holds(&weekdays, "2026-01-14T06:59:59Z"));
        assert!(holds(&weekdays, "2026-01-14T07:00:00Z"));
        assert!(holds(&weekdays, "2026-07-15T06:00:00Z"));
        assert!(!holds(&weekdays, "2026-07-15T16:00:00Z"));
        assert!(!holds(&weekdays, "2026-01-17T10:00:00Z"), "Saturday");
        let night = Schedule {
            days: 0b001_0000,
            times: vec![(22 * 60, 6 * 60)],
            zone,
        };
        assert!(holds(&night, "2026-01-16T21:30:00Z"), "Friday night");
        assert!(
            holds(&night, "2026-01-17T04:59:00Z"),
            "goes on into Saturday"
        );
        assert!(!holds(&night, "2026-01-17T21:30:00Z"));
        assert!(!holds(&night, "2026-01-16T04:59:00Z"), "Thursday night");
    }
}
