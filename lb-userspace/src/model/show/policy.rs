//! Policies in the words of the file.

use std::net::IpAddr;

use lb_common::addr::Addr;

use super::{Table, bare, named, quoted};
use crate::model::policy::{Action, Guard, Policy, Range, Rule, Schedule};

/// Ranges of a rule that are written as a list.
const LISTED: usize = 256;
/// Days as they are written, Monday first.
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// What is bound to a virtual server or to the network.
pub(super) fn guard(table: &mut Table, guard: &Guard) {
    if let Some(policy) = &guard.policy {
        table.word("policy", policy);
    }
    if let Some(staged) = &guard.staged {
        table.word("staged_policy", staged);
    }
    if let Some(rate) = &guard.rate {
        let rate = format!(
            "{{ per_source = {}, burst = {} }}",
            quoted(&per(rate.interval)),
            rate.burst
        );
        table.number("connection_rate", rate);
    }
}

/// The rate with this many nanoseconds between two, in the unit that gives it back.
fn per(interval: u64) -> String {
    let units = [
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    let fits = |(unit, period): (&str, u64)| {
        let count = period / interval;
        let exact = (count..=count + 1).find(|count| *count > 0 && period / count == interval)?;
        Some(format!("{exact}/{unit}"))
    };
    units
        .into_iter()
        .find_map(fits)
        .unwrap_or_else(|| "1/h".to_owned())
}

/// A policy and its rules.
pub(super) fn policy(policy: &Policy, tables: &mut Vec<Table>) {
    let mut table = named("policy", "policy", &policy.name);
    let default = if policy.default == Action::Accept {
        "accept"
    } else {
        "deny"
    };
    table.word("default", default);
    table.number("log", policy.log);
    tables.push(table);
    for shown in &policy.rules {
        tables.push(rule(policy, shown));
    }
}

fn rule(policy: &Policy, rule: &Rule) -> Table {
    let mut table = Table::new(
        format!("rule {:?}", format!("{}/{}", policy.name, rule.name)),
        format!("policy.{}.rule", bare(&policy.name)),
    );
    table.repeated = true;
    table.word("name", &rule.name);
    table.number("enabled", rule.enabled);
    let (listed, file) = match &rule.source_file {
        Some(file) => (&file.beside, Some(&file.path)),
        None => (&rule.source, None),
    };
    let texts: Vec<_> = listed.iter().flat_map(|range| written(*range)).collect();
    match &listed[..] {
        [] => {}
        [all] if *all == Range::ALL && file.is_none() => {}
        few if few.len() <= LISTED => table.list("source", texts.iter().map(String::as_str)),
        // One text takes no more room than the file's own.
        _ => table.word("source", &texts.join(" ")),
    }
    if let Some(path) = file {
        table.word("source_file", &super::path(path));
        table.notes.push((
            "sources when it was read",
            format!(
                "{} ranges, fingerprint {:016x}",
                rule.source.len(),
                fingerprint(&rule.source)
            ),
        ));
    }
    if !rule.vlans.is_empty() {
        let vlans: Vec<_> = rule.vlans.iter().map(ToString::to_string).collect();
        table.number("vlans", format!("[{}]", vlans.join(", ")));
    }
    if !rule.interfaces.is_empty() {
        table.list("interfaces", rule.interfaces.iter().map(String::as_str));
    }
    table.word("action", rule.action.word());
    match rule.action {
        Action::RejectIcmp => table.word("reject_with", "icmp"),
        Action::RejectRst => table.word("reject_with", "rst"),
        Action::Accept | Action::Drop => {}
    }
    table.number("log", rule.log);
    if let Some(schedule) = &rule.schedule {
        table.number("schedule", when(schedule));
    }
    table
}

/// Tells two lists of ranges apart (FNV-1a, by words).
fn fingerprint(ranges: &[Range]) -> u64 {
    let words = ranges
        .iter()
        .flat_map(|range| [range.first >> 64, range.first, range.last >> 64, range.last]);
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ word as u64).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A range as entries of a source: one of addresses of both families falls apart where IPv4 lies.
pub(super) fn written(range: Range) -> Vec<String> {
    let ipv4 = Range::prefix(IpAddr::from([0, 0, 0, 0]), 0);
    let before = Range {
        first: range.first,
        last: range.last.min(ipv4.first - 1),
    };
    let within = Range {
        first: range.first.max(ipv4.first),
        last: range.last.min(ipv4.last),
    };
    let after = Range {
        first: range.first.max(ipv4.last + 1),
        last: range.last,
    };
    let parts = [before, within, after]
        .into_iter()
        .filter(|part| part.first <= part.last);
    let address = |number: u128| {
        let words = [96, 64, 32, 0].map(|shift| ((number >> shift) as u32).to_be());
        Addr(words).to_ip()
    };
    let text = |part: Range| {
        let (first, last) = (address(part.first), address(part.last));
        let length = (part.first ^ part.last).leading_zeros() as u8;
        let length = if first.is_ipv4() { length - 96 } else { length };
        match Range::prefix(first, length) == part {
            true if first == last => first.to_string(),
            true => format!("{first}/{length}"),
            false => format!("{first}-{last}"),
        }
    };
    parts.map(text).collect()
}

fn when(schedule: &Schedule) -> String {
    let days = (0..7).filter(|day| schedule.days & 1 << day != 0);
    let days: Vec<_> = days.map(|day| quoted(DAYS[day])).collect();
    let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
    let times = schedule.times.iter();
    let times: Vec<_> = times
        .map(|(from, to)| quoted(&format!("{}-{}", clock(*from), clock(*to))))
        .collect();
    let zone = schedule.zone.iana_name().unwrap_or("UTC");
    format!(
        "{{ days = [{}], times = [{}], timezone = {} }}",
        days.join(", "),
        times.join(", "),
        quoted(zone)
    )
}
