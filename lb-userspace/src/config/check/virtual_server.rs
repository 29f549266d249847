//! `[virtual_server.NAME]`.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
};

use lb_common::layout::{MAX_PLACES, MAX_VIRTUAL_SERVERS};

use super::{Known, policy, reference, session, snat, tls};
use crate::{
    config::{
        diagnostic::Faults,
        raw::{self, Plane, Raw},
        reader::{At, Field},
    },
    model::{Forward, Mode, Places, ProxyHeader, VirtualServer},
};

/// Number 0 of the table of the kernel plane means "none".
const MOST: usize = MAX_VIRTUAL_SERVERS as usize - 1;

impl raw::VirtualServer<'_> {
    /// For consequences: with address and port where they are readable.
    pub(super) fn described(&self) -> String {
        match self.places().next() {
            Some((address, _, port)) => {
                format!("{} ({})", self.object, SocketAddr::new(address, port))
            }
            None => self.object.clone(),
        }
    }

    /// Address, prefix length and port of each place it takes, where they are readable.
    pub(super) fn places(&self) -> impl Iterator<Item = (IpAddr, u8, u16)> {
        let ports = self.ports.get().map_or(&[][..], Vec::as_slice);
        let ports = ports.iter().flat_map(|(from, to)| *from..=*to);
        let address = self.address.get().copied();
        ports.filter_map(move |port| address.map(|(address, length)| (address, length, port)))
    }
}

/// `mode` is nothing where it is wrong.
pub(super) fn virtual_server(
    raw: &raw::VirtualServer<'_>,
    mode: Option<Mode>,
    known: &Known<'_, '_>,
    directory: &Path,
    faults: &mut Faults,
) -> Option<VirtualServer> {
    unique_address(raw, known, faults);
    let pool = match &raw.pool {
        Field::Is(given) => {
            let names = known.pools.keys().copied();
            let consequence = "Every connection to it would be refused.";
            reference(given, "pool", names, &raw.object, consequence, faults)
        }
        Field::Absent | Field::Wrong => None,
    };
    let forward = match &raw.forward {
        Field::Is(At {
            value: Plane::Passthrough,
            ..
        }) => {
            same_family(raw, known, faults);
            passthrough(raw, known, faults)
        }
        Field::Is(At {
            value: Plane::Proxy,
            at,
        }) => {
            if mode == Some(Mode::PassthroughOnly) {
                faults.error(
                    *at,
                    &raw.object,
                    "has forward = \"proxy\" in mode = \"passthrough-only\"",
                    "The proxy plane does not run in this mode.",
                    "Set forward = \"passthrough\", or mode = \"mixed\".",
                );
            }
            proxy(raw, known, directory, faults)
        }
        Field::Absent | Field::Wrong => None,
    };
    let guard = policy::guard(&raw.guard, &known.policies, &raw.object, faults);
    let (address, length) = *raw.address.get()?;
    Some(VirtualServer {
        name: raw.name.value.into(),
        at: Places {
            address,
            length,
            ports: raw.ports.get()?.clone(),
        },
        forward: forward?,
        pool: pool?,
        guard: guard?,
    })
}

/// Notes what does not fit the table of the kernel plane.
pub(super) fn limit(raw: &Raw<'_>, faults: &mut Faults) {
    if let Some(server) = raw.virtual_servers.get(MOST) {
        faults.error(
            server.name.at,
            "the file",
            format!("has {} virtual servers", raw.virtual_servers.len()),
            format!(
                "{MOST} is the most; {} is the first beyond it.",
                server.object
            ),
            "Run a second box for the rest.",
        );
    }
    let mut places = 0;
    for server in &raw.virtual_servers {
        let before = places;
        places += server.places().count();
        if before < MAX_PLACES as usize && places >= MAX_PLACES as usize {
            faults.error(
                server.name.at,
                &server.object,
                format!("brings the file to {places} ports of virtual servers"),
                format!("{} is the most, each port of each counted.", MAX_PLACES - 1),
                "Name fewer ports, or run a second box for the rest.",
            );
        }
    }
}

fn unique_address(raw: &raw::VirtualServer<'_>, known: &Known<'_, '_>, faults: &mut Faults) {
    let Field::Is(ip) = &raw.address else {
        return;
    };
    let taken = raw.places().find_map(|place| {
        let first = known.addresses.get(&place)?;
        (first.name.at != raw.name.at).then_some((place, first))
    });
    if let Some(((address, length, port), first)) = taken {
        let host = length == if address.is_ipv4() { 32 } else { 128 };
        let place = match host {
            true => SocketAddr::new(address, port).to_string(),
            false => format!("{address}/{length} port {port}"),
        };
        faults.error(
            ip.at,
            &raw.object,
            format!("has the address and port {place} of {}", first.object),
            "Only one of them could take the connections.",
            "Change the address or the port of one of them.",
        );
    }
}

/// An address of the client's, or of the box in its stead, reaches members of its own family alone.
pub(super) fn same_family(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) {
    let Some((address, _)) = raw.address.get() else {
        return;
    };
    let (consequence, remedy) = match raw.forward.get() {
        Some(Plane::Proxy) => (
            "snat = \"none\" keeps the client's address, and one family cannot be turned into the other.",
            "snat = \"automap\"",
        ),
        _ => (
            "The kernel plane cannot turn one family into the other.",
            "forward = \"proxy\"",
        ),
    };
    for pool in [&raw.pool, &raw.client.plaintext_pool] {
        let Field::Is(pool) = pool else { continue };
        let members = known
            .pools
            .get(pool.value)
            .and_then(|pool| pool.members.get());
        let stranger = members.into_iter().flatten().find(|member| {
            let other = member.address.get();
            other.is_some_and(|other| other.is_ipv4() != address.is_ipv4())
        });
        let Some(member) = stranger else { continue };
        let (ours, theirs) = if address.is_ipv4() {
            ("IPv4", "IPv6")
        } else {
            ("IPv6", "IPv4")
        };
        faults.error(
            pool.at,
            &raw.object,
            format!(
                "passes {ours} through to the {theirs} address of {}",
                member.object
            ),
            consequence,
            format!("Use a pool of {ours} members, or {remedy}."),
        );
    }
}

fn passthrough(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<Forward> {
    let proxy_keys = tls::places(raw);
    let mut clean = true;
    for (key, at) in proxy_keys {
        let Some(at) = at else { continue };
        clean = false;
        faults.error(
            at,
            &raw.object,
            format!("has {key}, which has no meaning with forward = \"passthrough\""),
            "TLS goes end to end between client and member; this box has no part in it.",
            "Remove it, or set forward = \"proxy\".",
        );
    }
    for (key, at) in raw.terms.places() {
        clean = false;
        faults.error(
            at,
            &raw.object,
            format!("has {key}, which has no meaning with forward = \"passthrough\""),
            "The kernel plane carries packets, not sessions.",
            "Remove it, or set forward = \"proxy\".",
        );
    }
    let snat = snat::choice(raw, known, faults)?;
    let proxy_protocol = match &raw.terms.proxy_protocol {
        Field::Absent => false,
        Field::Wrong => return None,
        Field::Is(At { value, at }) => {
            if *value == ProxyHeader::V1 {
                faults.error(
                    *at,
                    &raw.object,
                    "has proxy_protocol = \"v1\" with forward = \"passthrough\"",
                    "The kernel plane writes headers of version 2 alone.",
                    "Use proxy_protocol = \"v2\", or set forward = \"proxy\".",
                );
                return None;
            }
            *value == ProxyHeader::V2
        }
    };
    clean.then_some(Forward::Passthrough {
        snat,
        proxy_protocol,
    })
}

fn proxy(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    directory: &Path,
    faults: &mut Faults,
) -> Option<Forward> {
    let terms = session::terms(raw, known, faults);
    let client_tls = tls::client(raw, known, directory, faults);
    let server_tls = tls::server(raw, known, directory, faults);
    Some(Forward::Proxy {
        client_tls: client_tls?,
        server_tls: server_tls?,
        xclient: raw.xclient.clone().or(false)?,
        terms: terms?,
    })
}

/// Where a key's value stands; nothing where it is absent, or wrong and noted already.
pub(super) fn place<T>(field: &Field<T>) -> Option<usize> {
    match field {
        Field::Is(found) => Some(found.at),
        Field::Absent | Field::Wrong => None,
    }
}
