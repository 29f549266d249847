//! `virtual_server.port`: a number, a name, a range or a list of them.

use toml::{Spanned, de::DeValue};

use crate::config::{
    diagnostic::{Faults, did_you_mean, quoted},
    reader::{At, Field, Section},
};

use super::virtual_server::port_number;

/// Ports by the names that mail knows (RFC 5321 §4.5.4.2, RFC 6409 §3.1, RFC 8314 §7.3).
const SERVICES: [(&str, u16); 3] = [("smtp", 25), ("submission", 587), ("smtps", 465)];
/// Ports of one virtual server: each has a place in the table of the kernel plane.
const MOST: usize = 256;

/// The ports of a virtual server, from the first to the last, sorted and disjoint.
pub(super) fn read(section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<Vec<(u16, u16)>> {
    let key = "port";
    let Some(value) = section.value(key) else {
        return Field::Absent;
    };
    let at = value.span().start;
    let ranges = match value.get_ref() {
        DeValue::Array(items) if items.is_empty() => {
            faults.error(
                at,
                &section.object,
                "has an empty list of ports",
                "It would listen nowhere.",
                "Write for example `port = [25, 587]`.",
            );
            return Field::Wrong;
        }
        DeValue::Array(items) => items
            .iter()
            .map(|item| one(item, section, faults))
            .collect(),
        DeValue::String(_) => one(value, section, faults).map(|range| vec![range]),
        _ => {
            return port_number(key, section, faults)
                .and_then(|port| Some(vec![(port.value, port.value)]));
        }
    };
    let Some(mut ranges): Option<Vec<(u16, u16)>> = ranges else {
        return Field::Wrong;
    };
    ranges.sort_unstable();
    if let Some(pair) = ranges.windows(2).find(|pair| pair[0].1 >= pair[1].0) {
        faults.error(
            at,
            &section.object,
            format!("names the port {} twice", pair[1].0),
            "The second has no effect.",
            "Remove one of them.",
        );
        return Field::Wrong;
    }
    let count: usize = ranges
        .iter()
        .map(|(from, to)| usize::from(to - from) + 1)
        .sum();
    if count > MOST {
        faults.error(
            at,
            &section.object,
            format!("has {count} ports"),
            format!("{MOST} is the most of one virtual server."),
            "Name the ports that mail comes to.",
        );
        return Field::Wrong;
    }
    Field::Is(At { value: ranges, at })
}

/// One entry of the list.
fn one(
    value: &Spanned<DeValue<'_>>,
    section: &Section<'_, '_>,
    faults: &mut Faults,
) -> Option<(u16, u16)> {
    let text = match value.get_ref() {
        DeValue::String(text) => text.as_ref(),
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(number.as_str(), number.radix());
            if let Ok(port) = number.map_or(Ok(0), u16::try_from)
                && port != 0
            {
                return Some((port, port));
            }
            ""
        }
        _ => "",
    };
    if let Some((_, port)) = SERVICES.iter().find(|(name, _)| *name == text) {
        return Some((*port, *port));
    }
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port != 0);
    if let Some((from, to)) = text.split_once('-')
        && let (Some(from), Some(to)) = (number(from), number(to))
        && from <= to
    {
        return Some((from, to));
    }
    let guess = did_you_mean(text, SERVICES.iter().map(|(name, _)| *name));
    let shown = if text.is_empty() {
        "in its list".to_owned()
    } else {
        quoted(text)
    };
    faults.error(
        value.span().start,
        &section.object,
        format!("has an unknown port {shown}{guess}"),
        "It would listen nowhere.",
        "Write a number without quotes, one of \"smtp\", \"submission\", \"smtps\", or a range like \"1000-1010\".",
    );
    None
}
