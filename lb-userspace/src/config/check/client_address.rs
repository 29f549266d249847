//! What members learn of clients, and what else comes to their ports: SNAT, PROXY protocol headers, probes.

use std::{collections::BTreeMap, net::SocketAddr};

use super::Known;
use crate::{
    config::{
        diagnostic::Faults,
        raw::{self, Plane, ProbeKind, Raw},
        reader::Field,
    },
    model::ProxyHeader,
};

/// Warns of what is accepted, and mostly a mistake.
pub(super) fn advise(raw: &Raw<'_>, known: &Known<'_, '_>, faults: &mut Faults) {
    for server in &raw.virtual_servers {
        hidden_clients(server, faults);
    }
    probes(raw, faults);
    both_ways(raw, known, faults);
}

/// `proxy_protocol = "none"`, written out, says that it is meant.
fn hidden_clients(server: &raw::VirtualServer<'_>, faults: &mut Faults) {
    let translated = match &server.snat {
        Field::Absent => true,
        Field::Is(snat) => snat.value != "none",
        Field::Wrong => false,
    };
    let silent = matches!(server.terms.proxy_protocol, Field::Absent);
    let proxy = server.forward.get() == Some(&Plane::Proxy);
    let told = proxy && server.xclient.get() == Some(&true);
    if server.forward.get().is_none() || !translated || !silent || told {
        return;
    }
    let also = if proxy { ", xclient = true" } else { "" };
    faults.warning(
        server.name.at,
        &server.object,
        "hides its clients from the members",
        "They see an address of this box in every client's stead: a mail server that trusts it, as in Postfix's \
         mynetworks, is an open relay.",
        format!(
            "Set proxy_protocol = \"v2\"{also} or snat = \"none\"; or write proxy_protocol = \"none\", if no member trusts \
             this box."
        ),
    );
}

/// The header that a virtual server sends, and where its file says so.
fn header(server: &raw::VirtualServer<'_>) -> Option<usize> {
    match &server.terms.proxy_protocol {
        Field::Is(header) if header.value != ProxyHeader::None => Some(header.at),
        _ => None,
    }
}

/// The pools that a virtual server names.
fn pools<'r>(server: &'r raw::VirtualServer<'_>) -> impl Iterator<Item = &'r str> {
    let pools = [&server.pool, &server.client.plaintext_pool];
    pools.into_iter().filter_map(Field::get).copied()
}

/// A probe of `type = "smtp"` waits for a greeting, and a member that waits for a header gives none.
fn probes(raw: &Raw<'_>, faults: &mut Faults) {
    let speaks = |name: &str| {
        let mut monitors = raw.monitors.iter();
        let monitor = monitors.find(|monitor| monitor.name.value == name);
        monitor.is_some_and(|monitor| monitor.kind.get() == Some(&ProbeKind::Smtp))
    };
    let mut headed = BTreeMap::new();
    for server in &raw.virtual_servers {
        for pool in pools(server).filter(|_| header(server).is_some()) {
            headed.entry(pool).or_insert(server);
        }
    }
    for pool in &raw.pools {
        let (Field::Is(monitor), Some(server)) = (&pool.monitor, headed.get(pool.name.value))
        else {
            continue;
        };
        if !speaks(monitor.value) {
            continue;
        }
        faults.warning(
            monitor.at,
            &pool.object,
            format!(
                "has a monitor of type = \"smtp\", and {} sends its members a PROXY protocol header",
                server.object
            ),
            "Probes bring no header: a member that insists on one is found down.",
            "Use a monitor of type = \"tcp\".",
        );
    }
}

/// A port expects a header, or it does not.
fn both_ways(raw: &Raw<'_>, known: &Known<'_, '_>, faults: &mut Faults) {
    let mut plain: BTreeMap<SocketAddr, &raw::VirtualServer<'_>> = BTreeMap::new();
    for server in raw.virtual_servers.iter().filter(|server| {
        header(server).is_none() && !matches!(server.terms.proxy_protocol, Field::Wrong)
    }) {
        for (_, address) in members(server, known) {
            plain.entry(address).or_insert(server);
        }
    }
    for server in &raw.virtual_servers {
        let Some(at) = header(server) else { continue };
        let both = members(server, known)
            .find_map(|(member, address)| Some((member, plain.get(&address)?)));
        let Some((member, other)) = both else {
            continue;
        };
        faults.warning(
            at,
            &server.object,
            format!(
                "sends {} a PROXY protocol header, and {} sends none",
                member.object, other.object
            ),
            "A port expects one or it does not: connections of one of the two will fail.",
            "Give the mail server a port for each, and each port a pool.",
        );
    }
}

/// The members that a virtual server may choose, where they are readable.
fn members<'r>(
    server: &'r raw::VirtualServer<'_>,
    known: &'r Known<'_, '_>,
) -> impl Iterator<Item = (&'r raw::Member<'r>, SocketAddr)> {
    let pools = pools(server).filter_map(|pool| known.pools.get(pool));
    let members = pools.filter_map(|pool| pool.members.get()).flatten();
    members.filter_map(|member| {
        let address = SocketAddr::new(*member.address.get()?, *member.port.get()?);
        Some((member, address))
    })
}
