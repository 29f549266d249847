//! Addresses: of a kind that TCP connects to, one host each; those of virtual servers may be prefixes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::{
    config::{
        diagnostic::{Faults, quoted},
        reader::At,
    },
    model::policy::Range,
};

/// The address of a virtual server, or a prefix: the first address, and how many of its bits count.
pub(super) fn of_virtual_server(
    text: &At<&str>,
    object: &str,
    faults: &mut Faults,
) -> Option<(IpAddr, u8)> {
    if let Some((host, length)) = text.value.split_once('/')
        && let Ok(address) = host.parse::<IpAddr>()
    {
        return prefix(text, address, length, object, faults);
    }
    let address = host(text, object, "203.0.113.10", faults)?;
    Some((address, full(address)))
}

/// Bits of an address.
fn full(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn prefix(
    text: &At<&str>,
    address: IpAddr,
    length: &str,
    object: &str,
    faults: &mut Faults,
) -> Option<(IpAddr, u8)> {
    let shortest = if address.is_ipv4() { 8 } else { 32 };
    let bounds = shortest..=full(address);
    let Some(length) = length.parse().ok().filter(|length| bounds.contains(length)) else {
        faults.error(
            text.at,
            object,
            format!(
                "has address = {}, whose prefix length is out of range",
                quoted(text.value)
            ),
            format!("It goes from {} to {}.", bounds.start(), bounds.end()),
            "Write for example `address = \"203.0.113.0/24\"`.",
        );
        return None;
    };
    let range = Range::prefix(address, length);
    let [first, last] = [range.first, range.last].map(|number| {
        let words = [96, 64, 32, 0].map(|shift| ((number >> shift) as u32).to_be());
        lb_common::addr::Addr(words).to_ip()
    });
    if address != first {
        faults.error(
            text.at,
            object,
            format!(
                "has address = {}, which does not begin its prefix",
                quoted(text.value)
            ),
            "It could mean the one address as well as all of them.",
            format!("Write `address = \"{first}/{length}\"`, or the address alone."),
        );
        return None;
    }
    let whole = format!("{first}/{length}");
    let fault = unusable(first).or_else(|| unusable(last));
    let Some(kind) = fault else {
        return Some((first, length));
    };
    faults.error(
        text.at,
        object,
        format!("has address = {}, which holds {kind}", quoted(&whole)),
        "TCP cannot reach one host by it.",
        "Write the prefix of addresses that clients connect to.",
    );
    None
}

/// The address of a member.
pub(super) fn of_member(text: &At<&str>, object: &str, faults: &mut Faults) -> Option<IpAddr> {
    host(text, object, "10.0.0.11", faults)
}

fn host(text: &At<&str>, object: &str, example: &str, faults: &mut Faults) -> Option<IpAddr> {
    let Ok(address) = text.value.parse::<IpAddr>() else {
        let bare = text.value.trim_matches(['[', ']']);
        let remedy = if text.value.parse::<SocketAddr>().is_ok() {
            "Write the port into the key `port`.".to_owned()
        } else if bare.parse::<IpAddr>().is_ok() {
            "Write it without brackets.".to_owned()
        } else {
            format!(
                "Write an IPv4 or IPv6 address, for example `address = \"{example}\"`; names are not resolved."
            )
        };
        faults.error(
            text.at,
            object,
            format!(
                "has address = {}, which is no IP address",
                quoted(text.value)
            ),
            "No packet could be sent to it.",
            remedy,
        );
        return None;
    };
    let Some(kind) = unusable(address) else {
        return Some(address);
    };
    faults.error(
        text.at,
        object,
        format!("has address = {}, which is {kind}", quoted(text.value)),
        "TCP cannot reach one host by it.",
        format!("Write the address of one host, for example `address = \"{example}\"`."),
    );
    None
}

/// Which kind makes an address useless here.
fn unusable(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("the unspecified address"),
        _ if address.is_multicast() => Some("a multicast address"),
        IpAddr::V4(Ipv4Addr::BROADCAST) => Some("the broadcast address"),
        // Both planes carry IPv4 in this shape; two spellings of one address would go unnoticed.
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => {
            Some("an IPv4 address in IPv6 spelling")
        }
        // RFC 4007 §6: without a zone the interface is unknown.
        IpAddr::V6(address) if address.is_unicast_link_local() => Some("a link-local address"),
        _ => None,
    }
}
