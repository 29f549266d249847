//! `[snat.NAME]`, and what virtual servers say about SNAT.

use std::collections::BTreeMap;

use lb_common::pair::SOURCE_PAIRS;

use super::{Known, reference};
use crate::{
    config::{
        diagnostic::{Faults, did_you_mean, quoted},
        raw::{self, Raw},
        reader::{At, Field},
    },
    model::{Snat, SnatPool, Timeouts, policy::Range},
};

/// What `snat` may say besides the name of a pool.
const WORDS: [&str; 2] = ["automap", "none"];

/// `virtual_server.snat`.
pub(super) fn choice(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<Snat> {
    let given = match &raw.snat {
        Field::Absent => return Some(Snat::Automap),
        Field::Wrong => return None,
        Field::Is(given) => given,
    };
    match given.value {
        "automap" => return Some(Snat::Automap),
        "none" => return Some(Snat::None),
        _ => {}
    }
    let names = known.snat_pools.keys().copied();
    let guess = did_you_mean(given.value, WORDS);
    if !guess.is_empty() && !known.snat_pools.contains_key(given.value) {
        faults.error(
            given.at,
            &raw.object,
            format!("has an unknown snat {}{guess}", quoted(given.value)),
            "It would be open whose address the members see.",
            "Write snat = \"automap\", snat = \"none\", or the name of a `[snat.NAME]`.",
        );
        return None;
    }
    let consequence = "It would be open whose address the members see.";
    let name = reference(given, "snat", names, &raw.object, consequence, faults)?;
    families(raw, given, known, faults);
    Some(Snat::Pool(name))
}

/// Every family of the members needs an address in the SNAT pool.
fn families(
    raw: &raw::VirtualServer<'_>,
    given: &At<&str>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) {
    let snat = known.snat_pools.get(given.value);
    let Some(addresses) = snat.and_then(|snat| snat.addresses.get()) else {
        return;
    };
    let pools = [&raw.pool, &raw.client.plaintext_pool];
    let members = pools
        .into_iter()
        .filter_map(|pool| known.pools.get(pool.get()?)?.members.get())
        .flatten();
    let stranger = members
        .filter_map(|member| Some((member, member.address.get()?)))
        .find(|(_, member)| {
            !addresses
                .iter()
                .any(|address| address.value.is_ipv4() == member.is_ipv4())
        });
    if let Some((member, address)) = stranger {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        faults.error(
            given.at,
            &raw.object,
            format!(
                "uses the SNAT pool {}, which has no {family} address",
                quoted(given.value)
            ),
            format!("{} could not be reached from it.", member.object),
            format!("Add an {family} address to the SNAT pool."),
        );
    }
}

pub(super) fn pool(
    raw: &raw::SnatPool<'_>,
    all: &Raw<'_>,
    seen: &mut BTreeMap<std::net::IpAddr, String>,
    faults: &mut Faults,
) -> Option<SnatPool> {
    if WORDS.contains(&raw.name.value) {
        faults.error(
            raw.name.at,
            &raw.object,
            "has a name that means something else",
            format!("snat = {} would be ambiguous.", quoted(raw.name.value)),
            "Give it another name.",
        );
    }
    let list = match &raw.addresses {
        Field::Is(list) => list,
        Field::Absent | Field::Wrong => return None,
    };
    if list.value.is_empty() {
        faults.error(
            list.at,
            &raw.object,
            "has no addresses",
            "No connection could come from it.",
            "Add one, or use snat = \"automap\".",
        );
    }
    for v4 in [true, false] {
        let count = list.value.iter().filter(|one| one.value.is_ipv4() == v4);
        let (count, family) = (count.count(), if v4 { "IPv4" } else { "IPv6" });
        if count > SOURCE_PAIRS {
            faults.error(
                list.at,
                &raw.object,
                format!("has {count} {family} addresses"),
                format!("{SOURCE_PAIRS} of a family are the most."),
                "Spread them over several SNAT pools.",
            );
        }
    }
    for address in &list.value {
        address_alone(address, raw, all, faults);
        if let Some(first) = seen.insert(address.value, raw.object.clone()) {
            faults.error(
                address.at,
                &raw.object,
                format!("has the address {} of {first}", address.value),
                "A port could be given out twice.",
                "Remove one of them.",
            );
        }
    }
    Some(SnatPool {
        name: raw.name.value.into(),
        addresses: list.value.iter().map(|address| address.value).collect(),
        ports: match &raw.ports {
            Field::Absent => None,
            Field::Wrong => return None,
            Field::Is(ports) => Some(ports.value),
        },
        exclude: raw.exclude.clone().or(Vec::new())?,
    })
}

/// An address of a SNAT pool serves SNAT alone.
fn address_alone(
    address: &At<std::net::IpAddr>,
    raw: &raw::SnatPool<'_>,
    all: &Raw<'_>,
    faults: &mut Faults,
) {
    let server = all.virtual_servers.iter().find(|server| {
        let at = server.address.get();
        at.is_some_and(|(first, length)| {
            first.is_ipv4() == address.value.is_ipv4()
                && Range::prefix(address.value, *length) == Range::prefix(*first, *length)
        })
    });
    let mut members = all
        .pools
        .iter()
        .filter_map(|pool| pool.members.get())
        .flatten();
    let other = match server {
        Some(server) => Some(&server.object),
        None => members
            .find(|member| member.address.get() == Some(&address.value))
            .map(|member| &member.object),
    };
    if let Some(other) = other {
        faults.error(
            address.at,
            &raw.object,
            format!("has the address {} of {other}", address.value),
            "Replies of members could not be told from other packets.",
            "Take an address that serves nothing else.",
        );
    }
}

pub(super) fn timeouts(raw: &raw::Timeouts) -> Option<Timeouts> {
    let default = Timeouts::default();
    Some(Timeouts {
        syn: raw.syn.clone().or(default.syn)?,
        established: raw.established.clone().or(default.established)?,
        half_closed: raw.half_closed.clone().or(default.half_closed)?,
        closing: raw.closing.clone().or(default.closing)?,
    })
}
