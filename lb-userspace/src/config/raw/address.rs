//! Addresses: one host each, of a kind that TCP connects to.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::{
    diagnostic::{Faults, quoted},
    phrase::not_yet,
    reader::At,
};

/// The address of a virtual server.
pub(super) fn of_virtual_server(
    text: &At<&str>,
    object: &str,
    faults: &mut Faults,
) -> Option<IpAddr> {
    if let Some((host, length)) = text.value.split_once('/')
        && host.parse::<IpAddr>().is_ok()
        && length.parse::<u8>().is_ok()
    {
        let instead = "Write a virtual server for each address; they may share the pool.";
        not_yet(
            text.at,
            object,
            &format!("the prefix {}", quoted(text.value)),
            instead,
            faults,
        );
        return None;
    }
    host(text, object, "203.0.113.10", faults)
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
