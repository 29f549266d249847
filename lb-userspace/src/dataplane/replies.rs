//! Replies of members to clients' addresses, brought to the box's own sockets.
//!
//! A proxy virtual server with `snat = "none"` connects from the client's address, so its members answer to an address
//! that is not the box's. A rule for each of them says that what comes from its port is for the box itself.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use netlink_packet_route::{
    AddressFamily, IpProtocol,
    route::{RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use crate::model::{Forward, Generation, Snat};

/// Marks our rules, as our routes and addresses are marked.
const OURS: RouteProtocol = RouteProtocol::Other(b'm');
/// The table that makes every address local, and the priority of the rules that lead to it: before the main table.
const TABLE: u32 = 4650;

/// A member and an interface that its replies come in by.
pub(super) type Way = (SocketAddr, String);

/// Makes sure that replies to clients' addresses reach the sockets of a generation. `lo` is the index of loopback.
///
/// # Errors
/// The kernel refuses.
pub(super) async fn add_all(handle: &Handle, generation: &Generation, lo: u32) -> Result<()> {
    let wanted = wanted(generation);
    if wanted.is_empty() {
        return Ok(());
    }
    let present = present(handle).await?;
    for v4 in [true, false] {
        if wanted.iter().any(|(member, _)| member.is_ipv4() == v4) {
            let route = everything(v4, lo);
            let added = handle.route().add(route).replace().execute().await;
            added.with_context(|| unusable("ip route"))?;
        }
    }
    for (member, interface) in wanted {
        if !present.contains(&(member, interface.clone())) {
            let mut request = handle.rule().add();
            *request.message_mut() = message(member, &interface);
            let added = request.execute().await;
            added.with_context(|| unusable("ip rule"))?;
        }
    }
    Ok(())
}

fn unusable(what: &str) -> String {
    format!(
        "cannot bring replies of members to this box ({what}, table {TABLE})\n  \
         snat = \"none\" of a proxy virtual server needs policy routing (CONFIG_IP_MULTIPLE_TABLES). \
         Use snat = \"automap\" and proxy_protocol instead."
    )
}

/// Removes rules of ours that a generation does not have, save those of members that are `reached` from clients'
/// addresses; false when there are any.
///
/// # Errors
/// The kernel refuses.
pub(super) async fn prune(
    handle: &Handle,
    generation: &Generation,
    reached: &[SocketAddr],
) -> Result<bool> {
    let wanted = wanted(generation);
    let mut complete = true;
    for rule in list(handle).await? {
        match way(&rule) {
            Some(way) if wanted.contains(&way) => {}
            Some((member, _)) if reached.contains(&member) => complete = false,
            _ => handle.rule().del(rule).execute().await?,
        }
    }
    Ok(complete)
}

/// Removes every rule of ours; the routes behind them go with all routes of ours.
///
/// # Errors
/// The kernel refuses.
pub(super) async fn remove(handle: &Handle) -> Result<()> {
    for rule in list(handle).await? {
        handle.rule().del(rule).execute().await?;
    }
    Ok(())
}

/// Our rules that are there.
///
/// # Errors
/// The kernel does not tell them.
pub(super) async fn present(handle: &Handle) -> Result<Vec<Way>> {
    Ok(list(handle).await?.iter().filter_map(way).collect())
}

/// Removes those of our rules that were not there `before`.
///
/// # Errors
/// The kernel refuses.
pub(super) async fn remove_others(handle: &Handle, before: &[Way]) -> Result<()> {
    for rule in list(handle).await? {
        if way(&rule).is_some_and(|way| !before.contains(&way)) {
            handle.rule().del(rule).execute().await?;
        }
    }
    Ok(())
}

fn wanted(generation: &Generation) -> BTreeSet<Way> {
    let pools = generation.virtual_servers.iter().flat_map(|server| {
        let plaintext = match &server.forward {
            Forward::Proxy {
                client_tls, terms, ..
            } if terms.snat == Snat::None => client_tls.plaintext_pool(),
            _ => return Vec::new(),
        };
        [Some(&server.pool), plaintext]
            .into_iter()
            .flatten()
            .collect()
    });
    let members = pools
        .filter_map(|pool| generation.pools.get(pool))
        .flat_map(|pool| pool.members.iter().map(|member| member.address));
    let interfaces = &generation.network.server_interfaces;
    members
        .flat_map(|member| interfaces.iter().map(move |it| (member, it.clone())))
        .collect()
}

async fn list(handle: &Handle) -> Result<Vec<RuleMessage>> {
    let mut ours = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut rules = handle.rule().get(version).execute();
        while let Some(rule) = rules.try_next().await? {
            if rule.attributes.contains(&RuleAttribute::Protocol(OURS)) {
                ours.push(rule);
            }
        }
    }
    Ok(ours)
}

fn message(member: SocketAddr, interface: &str) -> RuleMessage {
    let mut message = RuleMessage::default();
    (message.header.family, message.header.src_len) = match member.is_ipv4() {
        true => (AddressFamily::Inet, 32),
        false => (AddressFamily::Inet6, 128),
    };
    message.header.action = RuleAction::ToTable;
    let port = member.port();
    message.attributes = vec![
        RuleAttribute::Source(member.ip()),
        RuleAttribute::Iifname(interface.to_owned()),
        RuleAttribute::IpProtocol(IpProtocol::Tcp),
        RuleAttribute::SourcePortRange(RulePortRange {
            start: port,
            end: port,
        }),
        RuleAttribute::Priority(TABLE),
        RuleAttribute::Table(TABLE),
        RuleAttribute::Protocol(OURS),
    ];
    message
}

/// Nothing for a rule that is not as [`message`] makes them.
fn way(rule: &RuleMessage) -> Option<Way> {
    let (mut address, mut interface, mut port) = (None, None, None);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Source(source) => address = Some(*source),
            RuleAttribute::Iifname(name) => interface = Some(name.clone()),
            RuleAttribute::SourcePortRange(range) => port = Some(range.start),
            _ => {}
        }
    }
    Some((SocketAddr::new(address?, port?), interface?))
}

fn everything(v4: bool, lo: u32) -> netlink_packet_route::route::RouteMessage {
    match v4 {
        true => RouteMessageBuilder::<Ipv4Addr>::new()
            .output_interface(lo)
            .table_id(TABLE)
            .protocol(OURS)
            .scope(RouteScope::Host)
            .kind(RouteType::Local)
            .build(),
        false => RouteMessageBuilder::<Ipv6Addr>::new()
            .output_interface(lo)
            .table_id(TABLE)
            .protocol(OURS)
            .kind(RouteType::Local)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_known_again() {
        for member in ["10.0.0.11:25", "[2001:db8::11]:587"] {
            let member = member.parse().unwrap();
            let rule = message(member, "srv0");
            assert_eq!(way(&rule), Some((member, "srv0".to_owned())));
        }
        assert_eq!(way(&RuleMessage::default()), None);
    }
}
