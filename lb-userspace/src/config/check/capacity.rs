//! What the tables of the kernel plane have room for, counted here so that no start finds out.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use lb_common::{
    layout::MAX_VIEWS,
    pair::{self, MAX_PORT_SETS},
};

use super::{Faults, Raw};
use crate::model::{Forward, Generation, Name, Snat};

/// Pools, and each once more for each kind of SNAT they are used with.
const MOST_VIEWS: usize = MAX_VIEWS as usize - 1;
/// Half of what there is: in a reload both generations have theirs.
const MOST_PORT_SETS: usize = (MAX_PORT_SETS as usize - 1) / 2;

/// First and last port, and those in between that are left out.
type Ports = (u16, u16, Vec<(u16, u16)>);

/// What virtual servers need there, each once.
#[derive(Default)]
struct Needed<'g> {
    /// SNAT address, or nothing for the box's own, and member.
    pairs: BTreeSet<(Option<IpAddr>, SocketAddr)>,
    /// Of members that see their clients' addresses.
    lanes: usize,
    views: BTreeSet<(&'g Name, Option<&'g Snat>)>,
    /// Of SNAT pools; nothing for the box's own addresses, and for lanes.
    ports: BTreeSet<Option<Ports>>,
}

impl<'g> Needed<'g> {
    fn counts(&self) -> [usize; 3] {
        [
            self.pairs.len() + self.lanes,
            self.views.len(),
            self.ports.len(),
        ]
    }

    fn add(&mut self, generation: &'g Generation, pool: &'g Name, snat: &'g Snat) {
        self.views.insert((pool, Some(snat)));
        let Some(pool) = generation.pools.get(pool) else {
            return;
        };
        let members = pool.members.iter().map(|member| member.address);
        match snat {
            Snat::None => {
                self.lanes = pair::lanes(generation.network.max_flows);
                self.ports.insert(None);
            }
            Snat::Automap => {
                self.pairs.extend(members.map(|member| (None, member)));
                self.ports.insert(None);
            }
            Snat::Pool(name) => {
                let Some(own) = generation.snat_pools.get(name) else {
                    return;
                };
                for member in members {
                    let addresses = own.addresses.iter();
                    let fitting = addresses.filter(|it| it.is_ipv4() == member.is_ipv4());
                    self.pairs.extend(fitting.map(|it| (Some(*it), member)));
                }
                let (first, last) = own.ports.map_or((0, 0), |ports| (ports.first, ports.last));
                let exclude = own.exclude.iter().map(|it| (it.first, it.last)).collect();
                self.ports.insert(Some((first, last, exclude)));
            }
        }
    }
}

/// Notes the virtual server with which the file outgrows a table.
pub(super) fn capacity(raw: &Raw<'_>, generation: &Generation, faults: &mut Faults) {
    let flows = generation.network.max_flows;
    let room = pair::pairs(flows) as usize - 1;
    let limits = [room, MOST_VIEWS, MOST_PORT_SETS];
    let mut needed = Needed {
        views: generation.pools.keys().map(|pool| (pool, None)).collect(),
        ..Needed::default()
    };
    for (raw, server) in raw.virtual_servers.iter().zip(&generation.virtual_servers) {
        let Forward::Passthrough { snat, .. } = &server.forward else {
            continue;
        };
        let before = needed.counts();
        needed.add(generation, &server.pool, snat);
        let words = [
            (
                "pairs of SNAT address and member",
                format!("max_flows = {flows} makes room for {room}."),
                match room < pair::MAX_PAIRS as usize - 1 {
                    true => "Raise max_flows in [network], or take fewer SNAT addresses.",
                    false => "Take fewer SNAT addresses, or run a second box.",
                },
            ),
            (
                "pools, each counted again for each kind of SNAT it is used with",
                format!("{MOST_VIEWS} is the most."),
                "Use fewer kinds of SNAT with one pool, or run a second box.",
            ),
            (
                "different choices of ports for SNAT",
                format!("{MOST_PORT_SETS} is the most."),
                "Give SNAT pools the same ports and the same exclude.",
            ),
        ];
        let counts = needed.counts();
        for (place, (what, consequence, remedy)) in words.into_iter().enumerate() {
            if before[place] <= limits[place] && counts[place] > limits[place] {
                faults.error(
                    raw.name.at,
                    &raw.object,
                    format!("brings the file to {} {what}", counts[place]),
                    consequence,
                    remedy,
                );
            }
        }
    }
}
