//! Prefixes of virtual servers, made local by a route: every address of one is the box's own, without being listed.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context, Result};
use futures_util::TryStreamExt as _;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::model::Generation;

/// Marks our routes, as our addresses are marked.
const OURS: RouteProtocol = RouteProtocol::Other(b'm');
/// The kernel's table of its own addresses (linux/rtnetlink.h).
const LOCAL: u32 = 255;

/// A prefix: its first address and its length.
type Prefix = (IpAddr, u8);

/// What forbids the prefixes of a generation on this box: one that holds an address of `own`, those that the box has by
/// itself, would cut it off from its neighbours.
pub(super) fn conflicts(generation: &Generation, own: &[IpAddr]) -> Vec<String> {
    let servers = generation.virtual_servers.iter();
    let prefixes = servers.filter(|server| server.at.is_prefix());
    let conflict = prefixes.filter_map(|server| {
        let address = own.iter().find(|address| server.at.holds(**address))?;
        Some(format!(
            "virtual server {:?} takes {}, which holds the box's own address {address}\n  \
             The box could no longer reach its neighbours there. Use a prefix that is routed to the box.",
            server.name, server.at
        ))
    });
    conflict.collect()
}

/// Makes the prefixes of a generation local. `lo` is the index of loopback.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) async fn add_all(handle: &Handle, generation: &Generation, lo: u32) -> Result<()> {
    let present = list(handle).await?;
    for (address, length) in wanted(generation) {
        let known = present
            .iter()
            .any(|route| prefix(route) == Some((address, length)));
        if !known {
            let route = message(address, length, lo);
            let added = handle.route().add(route).execute().await;
            added.with_context(|| format!("cannot make {address}/{length} local"))?;
        }
    }
    Ok(())
}

/// Removes prefixes of ours that a generation does not have, save those that `lingering` connections use.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) async fn prune(
    handle: &Handle,
    generation: &Generation,
    lingering: &[IpAddr],
) -> Result<()> {
    let wanted = wanted(generation);
    for route in list(handle).await? {
        // One without a prefix is of `replies`: without its rules nothing leads to it.
        let stays = prefix(&route)
            .is_none_or(|prefix| wanted.contains(&prefix) || is_used(prefix, lingering));
        if !stays {
            handle.route().del(route).execute().await?;
        }
    }
    Ok(())
}

/// Is one of the addresses in the prefix?
fn is_used((first, length): Prefix, lingering: &[IpAddr]) -> bool {
    lingering.iter().any(|address| match (first, address) {
        (IpAddr::V4(first), IpAddr::V4(address)) => {
            let differs = first.to_bits() ^ address.to_bits();
            differs.leading_zeros() >= u32::from(length)
        }
        (IpAddr::V6(first), IpAddr::V6(address)) => {
            let differs = first.to_bits() ^ address.to_bits();
            differs.leading_zeros() >= u32::from(length)
        }
        _ => false,
    })
}

fn wanted(generation: &Generation) -> BTreeSet<Prefix> {
    let servers = generation.virtual_servers.iter();
    let prefixes = servers.filter(|server| server.at.is_prefix());
    prefixes
        .map(|server| (server.at.address, server.at.length))
        .collect()
}

/// Removes every route of ours.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) async fn remove(handle: &Handle) -> Result<()> {
    for route in list(handle).await? {
        handle.route().del(route).execute().await?;
    }
    Ok(())
}

/// What tells our routes apart: one without a prefix is of `replies`.
pub(super) type Key = (AddressFamily, Option<Prefix>);

/// Our routes that are there.
///
/// # Errors
///
/// When the kernel does not tell them.
pub(super) async fn present(handle: &Handle) -> Result<Vec<Key>> {
    Ok(list(handle).await?.iter().map(key).collect())
}

/// Removes those of our routes that were not there `before`.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) async fn remove_others(handle: &Handle, before: &[Key]) -> Result<()> {
    for route in list(handle).await? {
        if !before.contains(&key(&route)) {
            handle.route().del(route).execute().await?;
        }
    }
    Ok(())
}

fn key(route: &RouteMessage) -> Key {
    (route.header.address_family, prefix(route))
}

/// Our routes of both families.
async fn list(handle: &Handle) -> Result<Vec<RouteMessage>> {
    let mut ours = Vec::new();
    for any in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let mut all = handle.route().get(any).execute();
        // A box with a full table has a million others: none of them is kept.
        while let Some(route) = all.try_next().await? {
            if route.header.protocol == OURS {
                ours.push(route);
            }
        }
    }
    Ok(ours)
}

fn message(address: IpAddr, length: u8, lo: u32) -> RouteMessage {
    match address {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, length)
            .output_interface(lo)
            .table_id(LOCAL)
            .protocol(OURS)
            .scope(RouteScope::Host)
            .kind(RouteType::Local)
            .build(),
        IpAddr::V6(address) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(address, length)
            .output_interface(lo)
            .table_id(LOCAL)
            .protocol(OURS)
            .kind(RouteType::Local)
            .build(),
    }
}

fn prefix(route: &RouteMessage) -> Option<Prefix> {
    let address = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        });
    Some((address?, route.header.destination_prefix_length))
}
