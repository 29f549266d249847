//! What the tables of the kernel plane have room for, counted as `dataplane` fills them.

use std::collections::BTreeSet;

use lb_common::{
    layout::MAX_VIEWS,
    pair::{MAX_PAIRS, MAX_PORT_SETS, SOURCE_PAIRS, pairs_for},
};

use crate::{
    config::{diagnostic::Faults, raw::Raw},
    model::{Forward, Generation, Snat},
};

/// Records that a pair without an address lends.
const LANE: u32 = 1 << 16;
/// Sets of ports that no SNAT pool says: the empty one, all, and those of the box's own address in either family.
const SETS_OF_THE_BOX: usize = 4;

/// Notes the first virtual server that brings a table beyond its end. Number 0 of each table means "none".
pub(super) fn limits(raw: &Raw<'_>, generation: &Generation, faults: &mut Faults) {
    let flows = generation.network.max_flows;
    let (mut views, mut ports, mut pairs) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut lanes = 0;
    for (server, raw) in generation.virtual_servers.iter().zip(&raw.virtual_servers) {
        let Forward::Passthrough { snat, .. } = &server.forward else {
            continue;
        };
        if !views.insert((&server.pool, snat)) {
            continue;
        }
        let members = generation.pools[&server.pool].members.iter();
        let members = members.map(|member| member.address);
        match snat {
            Snat::None => lanes = (flows.div_ceil(LANE) as usize).min(SOURCE_PAIRS),
            Snat::Automap => pairs.extend(members.map(|member| (None, member))),
            Snat::Pool(name) => {
                let pool = &generation.snat_pools[name];
                ports.insert((pool.ports, &pool.exclude));
                for member in members {
                    let addresses = pool.addresses.iter();
                    let same = addresses.filter(|one| one.is_ipv4() == member.is_ipv4());
                    pairs.extend(same.map(|address| (Some(*address), member)));
                }
            }
        }
        let (pairs, most_pairs) = (pairs.len() + lanes, pairs_for(flows) as usize - 1);
        // The proxy plane has every pool once more.
        let (views, most_views) = (generation.pools.len() + views.len(), MAX_VIEWS as usize - 1);
        let (ports, most_ports) = (ports.len(), MAX_PORT_SETS as usize - SETS_OF_THE_BOX);
        let (found, consequence, remedy) = if pairs > most_pairs {
            (
                format!("{pairs} pairs of SNAT address and member"),
                format!("{most_pairs} are the most with max_flows = {flows}."),
                match most_pairs < MAX_PAIRS as usize - 1 {
                    true => "Raise max_flows, or use fewer addresses or members.",
                    false => "Use fewer addresses or members, or run a second box.",
                },
            )
        } else if views > most_views {
            (
                format!("{views} pools, each counted with every kind of SNAT it is used with"),
                format!("{most_views} are the most."),
                "Use fewer pools, or one kind of SNAT for each.",
            )
        } else if ports > most_ports {
            (
                format!("{ports} sets of SNAT ports"),
                format!("{most_ports} are the most."),
                "Give SNAT pools the same ports and exclude.",
            )
        } else {
            continue;
        };
        faults.error(
            raw.name.at,
            &raw.object,
            format!("brings the file to {found}"),
            consequence,
            remedy,
        );
        return;
    }
}
