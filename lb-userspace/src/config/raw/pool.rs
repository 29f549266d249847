//! `[pool.NAME]` and its members.

use std::net::IpAddr;

use super::{INCOMPLETE, address, virtual_server::port_number};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        phrase::{check_name, not_yet},
        reader::{At, Field, Section},
    },
    model::{Method, OnDown},
};

/// One pool.
pub(in crate::config) struct Pool<'d> {
    pub(in crate::config) name: At<&'d str>,
    pub(in crate::config) object: String,
    pub(in crate::config) method: Field<Method>,
    pub(in crate::config) monitor: Field<&'d str>,
    pub(in crate::config) on_down: Field<OnDown>,
    pub(in crate::config) members: Field<Vec<Member<'d>>>,
}

/// `[[pool.NAME.member]]`.
pub(in crate::config) struct Member<'d> {
    pub(in crate::config) object: String,
    pub(in crate::config) name: Field<&'d str>,
    pub(in crate::config) address: Field<IpAddr>,
    pub(in crate::config) port: Field<u16>,
}

pub(super) fn read<'d>(
    name: At<&'d str>,
    mut section: Section<'d, '_>,
    faults: &mut Faults,
) -> Pool<'d> {
    let instead = "Use method = \"least-connections\" or method = \"round-robin\".";
    let method = section.choice(
        "method",
        &[
            ("least-connections", Method::LeastConnections),
            ("round-robin", Method::RoundRobin),
        ],
        &[("maglev", instead), ("random-two", instead)],
        faults,
    );
    let monitor = section.string("monitor", "monitor = \"msa\"", faults);
    let on_down = section.choice(
        "on_down",
        &[("leave", OnDown::Leave), ("reset", OnDown::Reset)],
        &[],
        faults,
    );
    let example = format!("[[pool.{}.member]]", name.value);
    let members = section.list("member", &example, faults).and_then(|list| {
        Some(
            list.value
                .into_iter()
                .map(|section| member(name.value, section, faults))
                .collect(),
        )
    });
    section.later(
        "slow_ramp",
        "Remove it: a member that comes up takes its full part at once.",
        faults,
    );
    section.later(
        "min_active",
        "Remove it: every member that is up takes part.",
        faults,
    );
    section.later(
        "queue",
        "Remove it: without a free member the client gets a temporary refusal.",
        faults,
    );
    let object = section.object.clone();
    section.finish(faults);
    Pool {
        name,
        object,
        method,
        monitor,
        on_down,
        members,
    }
}

fn member<'d>(pool: &str, mut section: Section<'d, '_>, faults: &mut Faults) -> Member<'d> {
    let name = section.string("name", "name = \"msa1\"", faults);
    if let Field::Is(name) = &name {
        section.object = format!("member {} of pool {}", quoted(name.value), quoted(pool));
        check_name(name, &section.object, faults);
    }
    let example = "address = \"10.0.0.11\"";
    let address = section
        .string("address", example, faults)
        .and_then(|text| address::of_member(&text, &section.object, faults));
    let address = section.required(address, "address", INCOMPLETE, example, faults);
    let port = port_number("port", &mut section, faults);
    let port = section.required(port, "port", INCOMPLETE, "port = 25", faults);
    if let Field::Is(weight) = section.integer("weight", 0..=65_535, "weight = 1", faults)
        && weight.value != 1
    {
        let instead = "Remove it: members of a pool take equal parts.";
        not_yet(
            weight.at,
            &section.object,
            &format!("weight = {}", weight.value),
            instead,
            faults,
        );
    }
    section.later(
        "priority",
        "Remove it: every member that is up takes part.",
        faults,
    );
    section.later(
        "connection_limit",
        "Remove it, and limit connections on the member itself.",
        faults,
    );
    let object = section.object.clone();
    section.finish(faults);
    Member {
        object,
        name,
        address,
        port,
    }
}
