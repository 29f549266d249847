//! `[network]`.

use std::collections::BTreeSet;

use lb_common::layout::DEFAULT_FLOWS;

use super::{Known, policy};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        raw::{Plane, Raw},
        reader::{At, Field},
    },
    model::{Attach, Network},
};

/// Longest name of an interface, bytes: `IFNAMSIZ` of the kernel less its closing zero.
const LONGEST_NAME: usize = 15;

pub(super) fn network(
    raw: &Raw<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<Network> {
    let network = &raw.network;
    let passthrough = raw
        .virtual_servers
        .iter()
        .find(|server| server.forward.get() == Some(&Plane::Passthrough));
    let client_interfaces = interfaces(
        &network.client_interfaces,
        "client_interfaces",
        "network",
        faults,
    );
    let server_interfaces = interfaces(
        &network.server_interfaces,
        "server_interfaces",
        "network",
        faults,
    );
    if let (Some(server), true) = (
        raw.virtual_servers.first(),
        none(&network.client_interfaces),
    ) {
        faults.error(
            place(&network.client_interfaces, network.at, server.name.at),
            "network",
            "has no client_interfaces",
            format!(
                "{} would have no interface that clients reach.",
                server.object
            ),
            "Add for example `client_interfaces = [\"eth0\"]` to [network].",
        );
    }
    let needs_way_back = passthrough.or_else(|| {
        let mut servers = raw.virtual_servers.iter();
        servers.find(|server| server.snat.get() == Some(&"none"))
    });
    if let (Some(server), true) = (needs_way_back, none(&network.server_interfaces)) {
        let name = &server.object;
        let consequence = match passthrough {
            Some(_) => {
                format!("Replies to {name} would not find their way back through the kernel plane.")
            }
            None => format!(
                "What members answer to the clients of {name} would not come back to this box."
            ),
        };
        faults.error(
            place(&network.server_interfaces, network.at, server.name.at),
            "network",
            "has no server_interfaces",
            consequence,
            "Add for example `server_interfaces = [\"eth1\"]` to [network]; it may repeat a client interface.",
        );
    }
    let guard = policy::guard(&network.guard, &known.policies, "network", faults);
    Some(Network {
        guard: guard?,
        client_interfaces: client_interfaces?,
        server_interfaces: server_interfaces?,
        attach: network.attach.clone().or(Attach::Auto)?,
        max_flows: network.max_flows.clone().or(DEFAULT_FLOWS)?,
        snat_ports: match &network.snat_ports {
            Field::Absent => None,
            Field::Wrong => return None,
            Field::Is(ports) => Some(ports.value),
        },
        snat_exclude: network.snat_exclude.clone().or(Vec::new())?,
        vlans: vlans(&network.vlans, faults)?,
    })
}

fn vlans(list: &Field<Vec<At<u32>>>, faults: &mut Faults) -> Option<BTreeSet<u16>> {
    let list = match list {
        Field::Absent => return Some(BTreeSet::new()),
        Field::Wrong => return None,
        Field::Is(list) => list,
    };
    if list.value.is_empty() {
        faults.error(
            list.at,
            "network",
            "has no VLAN in vlans",
            "Tagged frames for virtual servers would all be dropped.",
            "Name the VLANs that clients may use, or remove the key: then all are taken.",
        );
        return None;
    }
    let mut good = BTreeSet::new();
    for vlan in &list.value {
        if !good.insert(u16::try_from(vlan.value).ok()?) {
            faults.error(
                vlan.at,
                "network",
                format!("has {} twice in vlans", vlan.value),
                "One of them says nothing.",
                "Remove one of them.",
            );
            return None;
        }
    }
    Some(good)
}

/// Is the list absent or empty? A wrong one has been noted already.
fn none(list: &Field<Vec<At<&str>>>) -> bool {
    match list {
        Field::Absent => true,
        Field::Wrong => false,
        Field::Is(list) => list.value.is_empty(),
    }
}

/// Where a missing interface is best reported: at the list, at the table, or at what needs it.
fn place(list: &Field<Vec<At<&str>>>, table: Option<usize>, user: usize) -> usize {
    match list {
        Field::Is(list) => list.at,
        _ => table.unwrap_or(user),
    }
}

pub(super) fn interfaces(
    list: &Field<Vec<At<&str>>>,
    key: &str,
    object: &str,
    faults: &mut Faults,
) -> Option<Vec<String>> {
    let names = match list {
        Field::Absent => return Some(Vec::new()),
        Field::Wrong => return None,
        Field::Is(list) => &list.value,
    };
    let mut seen = BTreeSet::new();
    let mut good = Vec::with_capacity(names.len());
    for name in names {
        if !valid(name.value) {
            faults.error(
                name.at,
                object,
                format!(
                    "has {} in {key}, which is no interface name",
                    quoted(name.value)
                ),
                "The kernel has no such interface.",
                format!("Write a name as `ip link` shows it, at most {LONGEST_NAME} bytes long."),
            );
        } else if !seen.insert(name.value) {
            faults.error(
                name.at,
                object,
                format!("has {} twice in {key}", quoted(name.value)),
                "Once is enough.",
                "Remove one of them.",
            );
        } else {
            good.push(name.value.to_owned());
        }
    }
    (good.len() == names.len()).then_some(good)
}

/// The rule of the kernel for names of network devices.
fn valid(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.contains(|character: char| {
            matches!(character, '/' | ':') || character.is_whitespace() || character.is_control()
        })
}
