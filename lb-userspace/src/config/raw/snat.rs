//! `[snat.NAME]`, `[timeouts]` and ports of SNAT.

use std::{net::IpAddr, time::Duration};

use toml::de::DeValue;

use super::{INCOMPLETE, address};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        phrase::shown,
        reader::{At, Field, Section},
    },
    model::PortRange,
};

/// `[snat.NAME]`.
pub(in crate::config) struct SnatPool<'d> {
    pub(in crate::config) name: At<&'d str>,
    pub(in crate::config) object: String,
    pub(in crate::config) addresses: Field<Vec<At<IpAddr>>>,
    pub(in crate::config) ports: Field<PortRange>,
    pub(in crate::config) exclude: Field<Vec<PortRange>>,
}

/// `[timeouts]`.
#[derive(Debug)]
pub(in crate::config) struct Timeouts {
    pub(in crate::config) syn: Field<Duration>,
    pub(in crate::config) established: Field<Duration>,
    pub(in crate::config) half_closed: Field<Duration>,
    pub(in crate::config) closing: Field<Duration>,
}

pub(super) fn read<'d>(
    name: At<&'d str>,
    mut section: Section<'d, '_>,
    faults: &mut Faults,
) -> SnatPool<'d> {
    let example = "addresses = [\"10.0.0.200\", \"10.0.0.201\"]";
    let addresses = section
        .strings("addresses", example, faults)
        .and_then(|list| {
            let found: Vec<_> = list
                .value
                .iter()
                .map(|text| {
                    let value = address::of_member(text, &section.object, faults)?;
                    Some(At { value, at: text.at })
                })
                .collect();
            found.into_iter().collect()
        });
    let addresses = section.required(addresses, "addresses", INCOMPLETE, example, faults);
    let ports = range("ports", &mut section, faults);
    let exclude = ranges("exclude", &mut section, faults);
    let object = section.object.clone();
    section.finish(faults);
    SnatPool {
        name,
        object,
        addresses,
        ports,
        exclude,
    }
}

pub(super) fn timeouts(top: &mut Section<'_, '_>, faults: &mut Faults) -> Timeouts {
    let absent = Timeouts {
        syn: Field::Absent,
        established: Field::Absent,
        half_closed: Field::Absent,
        closing: Field::Absent,
    };
    let Some(value) = top.value("timeouts") else {
        return absent;
    };
    let DeValue::Table(entries) = value.get_ref() else {
        faults.error(
            value.span().start,
            "timeouts",
            "is not a table",
            "Nothing can be read from it.",
            "Begin it with a line `[timeouts]`.",
        );
        return absent;
    };
    let mut section = Section::new("timeouts".to_owned(), value.span().start, entries);
    let timeouts = Timeouts {
        syn: section.duration("syn", "syn = \"64s\"", faults),
        established: section.duration("established", "established = \"124m\"", faults),
        half_closed: section.duration("half_closed", "half_closed = \"4m\"", faults),
        closing: section.duration("closing", "closing = \"60s\"", faults),
    };
    section.finish(faults);
    timeouts
}

/// Ports from one to another, in a text.
pub(super) fn range(
    key: &'static str,
    section: &mut Section<'_, '_>,
    faults: &mut Faults,
) -> Field<PortRange> {
    let example = format!("{key} = \"10000-32767\"");
    section.string(key, &example, faults).and_then(|text| {
        let range = parse(text.value);
        if range.is_none() {
            no_range(text.at, &section.object, key, &quoted(text.value), faults);
        }
        range
    })
}

/// A list of ports and of ranges.
pub(super) fn ranges(
    key: &'static str,
    section: &mut Section<'_, '_>,
    faults: &mut Faults,
) -> Field<Vec<PortRange>> {
    let Some(value) = section.value(key) else {
        return Field::Absent;
    };
    let at = value.span().start;
    let DeValue::Array(items) = value.get_ref() else {
        no_range(at, &section.object, key, &shown(value), faults);
        return Field::Wrong;
    };
    let mut ranges = Vec::with_capacity(items.len());
    for item in items {
        let range = match item.get_ref() {
            DeValue::String(text) => parse(text),
            DeValue::Integer(number) => {
                let number = u16::from_str_radix(number.as_str(), number.radix()).ok();
                number.filter(|number| *number != 0).map(|port| PortRange {
                    first: port,
                    last: port,
                })
            }
            _ => None,
        };
        let Some(range) = range else {
            no_range(
                item.span().start,
                &section.object,
                key,
                &shown(item),
                faults,
            );
            return Field::Wrong;
        };
        ranges.push(range);
    }
    Field::Is(At { value: ranges, at })
}

fn no_range(at: usize, object: &str, key: &str, shown: &str, faults: &mut Faults) {
    faults.error(
        at,
        object,
        format!("has {shown} in {key}, which is no range of ports"),
        "It would be open which ports are meant.",
        "Write a port as a number, or a range in quotes, the lower port first: \"10000-32767\".",
    );
}

fn parse(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    let (first, last) = (port(first)?, port(last)?);
    (first != 0 && first <= last).then_some(PortRange { first, last })
}
