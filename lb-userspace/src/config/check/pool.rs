//! `[pool.NAME]`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lb_common::layout::{MAX_MEMBERS, MAX_POOLS, POOL_MEMBERS};

use super::{Known, all, reference};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        raw::{self, Raw},
        reader::{At, Field},
    },
    model::{Member, Method, Name, OnDown, Pool},
};

/// Number 0 of each table of the kernel plane means "none".
const MOST_POOLS: usize = MAX_POOLS as usize - 1;
/// As above.
const MOST_MEMBERS: usize = MAX_MEMBERS as usize - 1;

pub(super) fn pool(
    raw: &raw::Pool<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<Pool> {
    let monitor = match &raw.monitor {
        Field::Absent => Some(None),
        Field::Wrong => None,
        Field::Is(given) => {
            let names = known.monitors.iter().copied();
            let consequence = "Its members would never be probed.";
            reference(given, "monitor", names, &raw.object, consequence, faults).map(Some)
        }
    };
    let members = members(raw, known, faults);
    Some(Pool {
        name: raw.name.value.into(),
        method: raw.method.clone().or(Method::LeastConnections)?,
        monitor: monitor?,
        on_down: raw.on_down.clone().or(OnDown::Leave)?,
        members: members?,
    })
}

/// Notes what does not fit the tables of the kernel plane all together.
pub(super) fn limits(raw: &Raw<'_>, faults: &mut Faults) {
    if let Some(pool) = raw.pools.get(MOST_POOLS) {
        faults.error(
            pool.name.at,
            "the file",
            format!("has {} pools", raw.pools.len()),
            format!(
                "{MOST_POOLS} is the most; {} is the first beyond it.",
                pool.object
            ),
            "Share pools between virtual servers, or run a second box.",
        );
    }
    let mut count = 0;
    for pool in &raw.pools {
        let before = count;
        count += pool.members.get().map_or(0, Vec::len);
        if before <= MOST_MEMBERS && count > MOST_MEMBERS {
            faults.error(
                pool.name.at,
                &pool.object,
                format!("brings the file to {count} members"),
                format!("{MOST_MEMBERS} is the most in all pools together."),
                "Share pools between virtual servers, or run a second box.",
            );
        }
    }
}

fn members(raw: &raw::Pool<'_>, known: &Known<'_, '_>, faults: &mut Faults) -> Option<Vec<Member>> {
    let (at, list) = match &raw.members {
        Field::Wrong => return None,
        Field::Absent => (raw.name.at, &[][..]),
        Field::Is(list) => (list.at, &list.value[..]),
    };
    if list.is_empty() {
        let consequence = match known.served.get(raw.name.value) {
            Some(server) => format!("{} would refuse every connection.", server.described()),
            None => "It could serve nothing.".to_owned(),
        };
        faults.error(
            at,
            &raw.object,
            "has no members",
            consequence,
            format!(
                "Add a table `[[pool.{}.member]]` with address and port.",
                raw.name.value
            ),
        );
        return None;
    }
    if list.len() > POOL_MEMBERS {
        faults.error(
            at,
            &raw.object,
            format!("has {} members", list.len()),
            format!("{POOL_MEMBERS} is the most in one pool."),
            "Spread them over several pools.",
        );
    }
    let mut names = BTreeSet::new();
    let mut addresses = BTreeMap::new();
    all(list.iter().map(|member| {
        let name = unique_name(member, &mut names, raw, faults);
        let address = unique_address(member, &mut addresses, raw, known, faults)?;
        let name = name?.map_or_else(|| address.to_string().into(), Name::from);
        Some(Member { name, address })
    }))
}

fn unique_name<'d>(
    member: &raw::Member<'d>,
    names: &mut BTreeSet<&'d str>,
    pool: &raw::Pool<'_>,
    faults: &mut Faults,
) -> Option<Option<&'d str>> {
    let name = match &member.name {
        Field::Absent => return Some(None),
        Field::Wrong => return None,
        Field::Is(name) => name,
    };
    if names.insert(name.value) {
        return Some(Some(name.value));
    }
    faults.error(
        name.at,
        &pool.object,
        format!("has two members with the name {}", quoted(name.value)),
        "Commands and metrics could not tell them apart.",
        "Rename one of them.",
    );
    None
}

fn unique_address<'r, 'd>(
    member: &'r raw::Member<'d>,
    addresses: &mut BTreeMap<SocketAddr, &'r raw::Member<'d>>,
    pool: &raw::Pool<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<SocketAddr> {
    let (Field::Is(ip), Some(port)) = (&member.address, member.port.get()) else {
        return None;
    };
    let address = SocketAddr::new(ip.value, *port);
    if let Some(server) = known.server_at(address) {
        faults.error(
            ip.at,
            &member.object,
            format!("has the address of {}", server.described()),
            "The box would connect to itself, round and round.",
            "Write the address of the mail server itself.",
        );
        return None;
    }
    own_address(member, ip, pool, known, faults);
    if let Some(first) = addresses.get(&address) {
        faults.error(
            ip.at,
            &member.object,
            format!("has the address {address} of {}", first.object),
            "One mail server would get two parts of the load and be probed twice.",
            "Remove one of them, or correct its address.",
        );
        return None;
    }
    addresses.insert(address, member);
    Some(address)
}

/// The kernel plane sends packets on by the routing table, and never to the box itself.
fn own_address(
    member: &raw::Member<'_>,
    ip: &At<IpAddr>,
    pool: &raw::Pool<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) {
    let Some(passing) = known.passed.get(pool.name.value) else {
        return;
    };
    let found = match known.server_on(ip.value) {
        _ if ip.value.is_loopback() => format!("has the address {}, which is loopback", ip.value),
        Some(server) => format!("has the address of {}, at another port", server.described()),
        None => return,
    };
    faults.error(
        ip.at,
        &member.object,
        found,
        "The box has this address itself, and the kernel plane passes no packet on to the box.",
        format!(
            "Write the address of the mail server itself, or set forward = \"proxy\" for {}.",
            passing.object
        ),
    );
}
